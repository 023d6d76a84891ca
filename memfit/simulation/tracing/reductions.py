"""The scratch memory of reductions: `sum`, `mean`, norms, `var`.

PyTorch's reduction kernel splits a long sum over many thread blocks. Each block writes its part to
a buffer in global memory, and counts itself in a semaphore. The number of blocks follows from the
shape, the strides and the card. This module repeats the host code that decides it.

Source: `setReduceConfig` and `ReduceConfig` in aten/src/ATen/native/cuda/Reduce.cuh, and
    `reorder_dimensions` and `coalesce_dimensions` in aten/src/ATen/TensorIterator.cpp.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch

from memfit.cards import Gpu
from memfit.simulation.needs import Need
from memfit.simulation.tracing.scripts import ALONE, OUTPUTS, Drop, Script, Workspace

__all__ = ["input_vector", "reduction", "reduction_scratch", "scratch_of_rows"]

_WARP: Final = 32
_MAX_THREADS: Final = 512
_MIN_VALUES_PER_THREAD: Final = 16
_MAX_VALUES_PER_THREAD: Final = 256
_LONG_ROW: Final = 128
_OUTPUT_VECTOR: Final = 4
_VECTOR: Final = 4
_HALF_VECTOR: Final = 8
_HALF_BYTES: Final = 2
_SEMAPHORE_BYTES: Final = 4


def reduction(
    data: torch.Tensor, dims: Sequence[int], *, partial_bytes: int = 4, input_vector: int = 4
) -> Script:
    """Return the script of a reduction.

    Args:
        data: What is reduced.
        dims: The dimensions that are reduced; none for all.
        partial_bytes: The size of one block's partial result.
        input_vector: How many values a thread reads at once along the reduced dimension.
    """
    if not data.numel():
        return ALONE
    return (OUTPUTS, *reduction_scratch(data, dims, partial_bytes, input_vector))


def reduction_scratch(
    data: torch.Tensor, dims: Sequence[int], partial_bytes: int = 4, input_vector: int = 4
) -> Script:
    """Return the part of the script that follows the outputs; see `reduction`."""
    gone = {dim % data.ndim for dim in dims} if dims else set(range(data.ndim))
    described = [partial_bytes, input_vector, int(data.storage_offset())]
    for dim, (size, stride) in enumerate(zip(data.shape, data.stride(), strict=True)):
        described += (int(dim in gone), size, stride)
    numbers = tuple(described)
    return (
        Workspace(name="partial sums", need=Need(rule=_buffer_bytes, numbers=numbers)),
        Workspace(name="semaphores", need=Need(rule=_semaphore_bytes, numbers=numbers)),
        Drop.of("semaphores", "partial sums"),
    )


def input_vector(item_bytes: int) -> int:
    """Return how many values of a size a thread reads at once in a sum."""
    return _HALF_VECTOR if item_bytes == _HALF_BYTES else _VECTOR


def scratch_of_rows(gpu: Gpu, num_rows: int, num_columns: int, item_bytes: int) -> tuple[int, int]:
    """Return the bytes of partial sums and of semaphores when a matrix's rows are added.

    Args:
        gpu: The card.
        num_rows: The rows of the contiguous matrix.
        num_columns: Its columns.
        item_bytes: The bytes of a value.
    """
    numbers = (
        4,
        input_vector(item_bytes),
        0,
        1,
        num_rows,
        num_columns,
        0,
        num_columns,
        1,
    )
    return _buffer_bytes(gpu, *numbers), _semaphore_bytes(gpu, *numbers)


def _buffer_bytes(gpu: Gpu, *numbers: int) -> int:
    return _config_of(gpu, numbers).buffer_bytes


def _semaphore_bytes(gpu: Gpu, *numbers: int) -> int:
    return _config_of(gpu, numbers).semaphore_bytes


class _Dim(NamedTuple):
    """A dimension of the iteration: whether it is reduced, its size and the input's stride."""

    is_reduced: bool
    size: int
    stride: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Config:
    """How the kernel is launched, as far as its memory depends on it."""

    buffer_bytes: int
    semaphore_bytes: int

    @classmethod
    def of(
        cls, multiprocessors: int, threads_per_multiprocessor: int, numbers: Sequence[int]
    ) -> _Config:
        partial_bytes, values_at_once, offset, *rest = numbers
        given = [_Dim(bool(rest[i]), *rest[i + 1 : i + 3]) for i in range(0, len(rest), 3)]
        dims = _coalesced(given)
        num_outputs = math.prod(dim.size for dim in dims if not dim.is_reduced)
        num_inputs = math.prod(dim.size for dim in dims if dim.is_reduced)
        reduced = [dim for dim in dims if dim.is_reduced]
        kept = [dim for dim in dims if not dim.is_reduced]
        # Whether neighbouring threads read along what is reduced.
        along = not kept or (bool(reduced) and reduced[0].stride < kept[0].stride)
        width, height = (num_inputs, num_outputs) if along else (num_outputs, num_inputs)
        stride = (reduced if along else kept)[0].stride if dims else 1
        output_vector = 1
        if stride == 1:
            if along and width >= _LONG_ROW and len(reduced) == 1:
                width //= values_at_once
            elif not along:
                output_vector = _output_vector(dims, kept[0], offset)
                width //= output_vector
        block_width, block_height = _block(width, height, _MAX_THREADS // output_vector)
        step_input, step_output = (block_width, 1) if along else (1, block_width)
        threshold = min(block_height * _MIN_VALUES_PER_THREAD, _MAX_VALUES_PER_THREAD)
        reduces_y = -(-num_inputs // step_input) >= threshold
        if reduces_y:
            step_input *= block_height
        else:
            step_output *= block_height
        values = -(-num_inputs // step_input)
        grid = -(-(num_outputs // output_vector) // step_output)
        blocks_per_multiprocessor = threads_per_multiprocessor // (block_width * block_height)
        target = multiprocessors * blocks_per_multiprocessor
        if not (reduces_y and values >= _MAX_VALUES_PER_THREAD and grid <= target):
            return cls(0, 0)
        blocks = max(
            min(-(-target // grid), -(-values // _MIN_VALUES_PER_THREAD)),
            -(-values // _MAX_VALUES_PER_THREAD),
        )
        if blocks <= 1:
            return cls(0, 0)
        num_bytes = partial_bytes * num_outputs * blocks
        if not along:
            num_bytes *= block_width * output_vector
        return cls(num_bytes, _SEMAPHORE_BYTES * grid)


@functools.lru_cache(maxsize=1024)
def _config(multiprocessors: int, threads: int, numbers: tuple[int, ...]) -> _Config:
    return _Config.of(multiprocessors, threads, numbers)


def _config_of(gpu: Gpu, numbers: tuple[int, ...]) -> _Config:
    """Return how a kernel is launched on a card. Its buffer and its semaphores both ask."""
    return _config(gpu.multiprocessors, gpu.threads_per_multiprocessor, numbers)


def _coalesced(dims: Sequence[_Dim]) -> list[_Dim]:
    """Return the dimensions as a `TensorIterator` walks them: reduced first, then the output's."""
    reduced = sorted((d for d in dims if d.is_reduced and d.size > 1), key=lambda d: d.stride)
    # The output is contiguous, so its last dimension comes first.
    kept = [d for d in reversed(dims) if not d.is_reduced and d.size > 1]
    merged: list[_Dim] = []
    for dim in (*reduced, *kept):
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.is_reduced == dim.is_reduced
            and last.size * last.stride == dim.stride
        ):
            merged[-1] = _Dim(last.is_reduced, last.size * dim.size, last.stride)
        else:
            merged.append(dim)
    return merged


def _output_vector(dims: Sequence[_Dim], fastest: _Dim, offset: int) -> int:
    """Return how many outputs a thread computes at once."""
    vector = _OUTPUT_VECTOR
    for number in (offset, fastest.size, *(d.stride for d in dims if d is not fastest)):
        while number % vector:
            vector //= 2
    return vector


def _block(width: int, height: int, max_threads: int) -> tuple[int, int]:
    width = _power_of_two(width) if width < max_threads else max_threads
    height = _power_of_two(height) if height < max_threads else max_threads
    block_width = min(width, _WARP)
    block_height = min(height, max_threads // block_width)
    return min(width, max_threads // block_height), block_height


def _power_of_two(number: int) -> int:
    """Return the largest power of two that is not larger than a number, and at least 1."""
    return 1 << (max(number, 1).bit_length() - 1)
