"""What gradients of indexing and of embeddings take: they sort the positions that values go to.

Source: aten/src/ATen/native/cuda/Indexing.cu and Embedding.cu beside it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from memfit.cards import Gpu
from memfit.simulation.needs import Need
from memfit.simulation.tracing.releases import has_cub_3
from memfit.simulation.tracing.scripts import (
    ALONE,
    OUTPUTS,
    Drop,
    Release,
    Script,
    Workspace,
    contiguous_copy,
)

__all__ = ["embedding_backward", "index_put"]

_FEW_INDICES: Final = 3072
_SORTS_FEW_BITS: Final = (2, 13)  # pytorch/pytorch#183578
_HAS_ATOMIC_SUMS: Final = (2, 11)  # pytorch/pytorch#170589
_INDICES_OF_A_PART: Final = 10
_WARP: Final = 32
_THREADS_OF_A_BLOCK: Final = 1024
# What one block takes of a sort of 8-byte keys with 8-byte values, of a selection and of a sum, by
# compute capability; and what one block sorts alone.
_SORT_TILES: Final = (((9, 0), 4608), ((8, 0), 3840), ((0, 0), 2816))
_SELECTION_TILES: Final = (((9, 0), 4928), ((0, 0), 320))
_SELECTION_TILES_OF_CUB_2: Final = (((9, 0), 4480), ((0, 0), 320))
_SCAN_TILE: Final = 896
_ONE_TILE: Final = 2304
_KEY_BYTES: Final = 8
_DIGITS: Final = 256
_BITS_OF_A_DIGIT: Final = 8
_ALIGNMENT: Final = 256


def index_put(_kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Sort the positions to which values are added: two copies of them, and their order.

    Source: `index_put_with_sort_kernel` in aten/src/ATen/native/cuda/Indexing.cu.
    """
    data, indices, accumulates = args[0], args[1], len(args) > 3 and args[3]  # noqa: PLR2004
    if not accumulates:
        return ALONE
    given = [index for index in indices if index is not None]
    num_positions = math.prod(torch.broadcast_shapes(*(index.shape for index in given)))
    names = ("wrapped positions", "linear positions", "sorted positions", "order", "sorted order")
    first, *others = (Workspace(name=name, num_bytes=_KEY_BYTES * num_positions) for name in names)
    at = max(at for at, index in enumerate(indices) if index is not None)
    num_rows = math.prod(data.shape[: at + 1])
    sort = Workspace(
        name="sort", need=Need(rule=_sort_of_positions, numbers=(num_positions, num_rows - 1))
    )
    values = contiguous_copy("contiguous values", args[2])
    return (OUTPUTS, first, others[0], Drop.of(first.name), *values, *others[1:], sort)


def embedding_backward(kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Sort the indices, if there are many, and sum the gradients of each in parts.

    Source: `embedding_dense_backward_cuda` in aten/src/ATen/native/cuda/Embedding.cu, and
        `embedding_backward_cuda_kernel` in EmbeddingBackwardKernel.cu beside it.
    """
    gradient, indices, num_rows = args[:3]
    num_indices, index_bytes = indices.numel(), indices.element_size()
    release = kernels.torch_release
    sorted_bits = _num_bits(num_rows) if release >= _SORTS_FEW_BITS else 8 * _KEY_BYTES
    has_atomic_sums = (
        release >= _HAS_ATOMIC_SUMS and not torch.are_deterministic_algorithms_enabled()
    )
    cub = int(has_cub_3())

    def taken(name: str, rule: Callable[..., int], *numbers: int) -> Workspace:
        return Workspace(name=name, need=Need(rule=rule, numbers=(num_indices, *numbers)))

    sums_in_fp32: Script = ()
    if has_atomic_sums and gradient.dtype is not torch.float32:
        sums_in_fp32 = (taken("sums in fp32", _atomic_sums_bytes, num_rows, gradient.shape[-1]),)
    return (
        taken("sorted indices", _by_index, index_bytes),
        taken("order", _by_index, index_bytes),
        taken("range", _by_index, index_bytes),
        taken("sort", _sort_of_many, sorted_bits),
        Drop.of("sort", "range"),
        OUTPUTS,
        taken("starts of segments", _by_index, index_bytes),
        taken("number of segments", _one_number),
        taken("unique indices", _by_index, index_bytes),
        taken("selection of unique indices", _selection_bytes, cub),
        Drop.of("selection of unique indices", "unique indices"),
        taken("parts of each segment", _by_segment, num_rows, index_bytes),
        taken("first part of each segment", _by_segment, num_rows, index_bytes),
        taken("sum over segments", _scan_bytes, num_rows, cub),
        Drop.of("sum over segments"),
        taken("number of parts", _one_number),
        taken("starts of parts", _by_part, num_rows, index_bytes),
        taken("sums of parts", _sums_bytes, num_rows, gradient.shape[-1], int(has_atomic_sums)),
        *sums_in_fp32,
    )


def _if_many(rule: Callable[..., int]) -> Callable[..., int]:
    """Return a rule that asks for nothing where one kernel does it all."""

    @functools.wraps(rule)
    def asked(gpu: Gpu, num_indices: int, *numbers: int) -> int:
        return rule(gpu, num_indices, *numbers) if num_indices > _FEW_INDICES else 0

    return asked


@_if_many
def _by_index(_gpu: Gpu, num_indices: int, index_bytes: int) -> int:
    return index_bytes * num_indices


@_if_many
def _one_number(_gpu: Gpu, _num_indices: int) -> int:
    return 8


@_if_many
def _by_segment(_gpu: Gpu, num_indices: int, num_rows: int, index_bytes: int) -> int:
    return index_bytes * min(num_indices, num_rows)


@_if_many
def _by_part(_gpu: Gpu, num_indices: int, num_rows: int, index_bytes: int) -> int:
    return index_bytes * _num_parts(num_indices, num_rows)


@_if_many
def _sums_bytes(
    gpu: Gpu, num_indices: int, num_rows: int, row_size: int, has_atomic_sums: int
) -> int:
    """Return the sums of parts, or the segment of each where threads add to one sum."""
    num_parts = _num_parts(num_indices, num_rows)
    if has_atomic_sums and _is_crowded(gpu, num_indices, num_rows, row_size):
        return 8 * num_parts
    return 4 * num_parts * row_size


@_if_many
def _atomic_sums_bytes(gpu: Gpu, num_indices: int, num_rows: int, row_size: int) -> int:
    """Return the sums in fp32 to which threads add, of gradients in half precision."""
    is_crowded = _is_crowded(gpu, num_indices, num_rows, row_size)
    return 4 * min(num_indices, num_rows) * row_size if is_crowded else 0


def _is_crowded(gpu: Gpu, num_indices: int, num_rows: int, row_size: int) -> bool:
    """Whether there are few segments, and many parts of each."""
    num_segments = min(num_indices, num_rows)
    threads = -(-row_size // _WARP) * _WARP
    num_blocks = -(-num_segments * threads // min(threads, _THREADS_OF_A_BLOCK))
    is_many = _num_parts(num_indices, num_rows) > 4 * num_segments
    return is_many and num_blocks < 4 * gpu.multiprocessors


def _num_parts(num_indices: int, num_rows: int) -> int:
    return num_indices // _INDICES_OF_A_PART + min(num_indices, num_rows)


@_if_many
def _sort_of_many(gpu: Gpu, num_indices: int, num_bits: int) -> int:
    return _sort_bytes(gpu, num_indices, num_bits)


@_if_many
def _selection_bytes(gpu: Gpu, num_indices: int, is_cub_3: int) -> int:
    """Source: `DispatchUniqueByKey` in cub/device/dispatch/dispatch_unique_by_key.cuh."""
    tile = _at(_SELECTION_TILES if is_cub_3 else _SELECTION_TILES_OF_CUB_2, gpu)
    return _tiles_bytes(num_indices, tile, is_cub_3)


@_if_many
def _scan_bytes(_gpu: Gpu, num_indices: int, num_rows: int, is_cub_3: int) -> int:
    """Source: `DispatchScan` in cub/device/dispatch/dispatch_scan.cuh."""
    return _tiles_bytes(min(num_indices, num_rows), _SCAN_TILE, is_cub_3)


def _tiles_bytes(num_items: int, tile: int, is_cub_3: int) -> int:
    """Return the states of tiles, with those of a warp before the first."""
    states = 16 * (-(-num_items // tile) + _WARP)
    return _aligned(states) + is_cub_3 * _ALIGNMENT + _ALIGNMENT - 1


def _sort_of_positions(gpu: Gpu, num_positions: int, largest: int) -> int:
    return _sort_bytes(gpu, num_positions, _num_bits(largest))


def _num_bits(largest: int) -> int:
    """Source: `get_num_bits` in aten/src/ATen/cuda/cub.h."""
    return max(1, largest.bit_length())


def _sort_bytes(gpu: Gpu, num_keys: int, num_bits: int) -> int:
    """Return the temporary memory of a radix sort of keys with their order.

    Source: `DispatchRadixSort` in cub/device/dispatch/dispatch_radix_sort.cuh. The sizes of tiles
        are what sorts asked for on rehearsed cards.
    """
    if num_keys <= _ONE_TILE:
        return 1
    passes = -(-num_bits // _BITS_OF_A_DIGIT)
    parts = _sort_parts(num_keys, passes, num_blocks=-(-num_keys // _at(_SORT_TILES, gpu)))
    return sum(map(_aligned, parts)) + _ALIGNMENT - 1


def _sort_parts(num_keys: int, passes: int, *, num_blocks: int) -> Iterator[int]:
    yield 8 * _DIGITS * passes
    yield 4 * _DIGITS * num_blocks
    if passes > 1:
        yield from (_KEY_BYTES * num_keys,) * 2
    yield 4 * passes


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _at(tiles: tuple[tuple[tuple[int, int], int], ...], gpu: Gpu) -> int:
    return next(size for capability, size in tiles if gpu.compute_capability >= capability)
