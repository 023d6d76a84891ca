"""What the kernels of attention take from the allocator besides their outputs.

Source: aten/src/ATen/native/transformers/cuda/attention_backward.cu, the kernel's parameters in
    mem_eff_attention/kernel_backward.h and their choice in mem_eff_attention/kernels/
    generate_kernels.py, and flash_attn/flash_api.cpp.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch

from memfit.cards import Gpu
from memfit.simulation.needs import Need
from memfit.simulation.tracing.reductions import reduction_scratch
from memfit.simulation.tracing.scripts import OUTPUTS, Drop, Make, Script, Workspace

__all__ = [
    "RANDOM_STATE_ON_GPU",
    "efficient_backward",
    "efficient_forward",
    "flash_backward",
    "with_state_on_host",
]

RANDOM_STATE_ON_GPU: Final = (2, 14)
"""The release of torch since which efficient attention keeps its seed and offset on the GPU."""

_HALF: Final = (torch.float16, torch.bfloat16)
_FLASH_ROWS: Final = 128
_FLASH_HEAD_DIMS: Final = 32
# What precedes each tile of the query's gradient: a lock, a counter and padding.
_TILE_HEADER_BYTES: Final = 16
_MANY_BLOCKS: Final = 256
# The widest value that stays in registers.
_WIDE: Final = 128
_MOST_SPLITS: Final = 200
_SMALL_AMPERE: Final = ((8, 6), (8, 9))
_HAS_LARGE_SHARED_MEMORY: Final = ((8, 0), (9, 0), (10, 0), (10, 3))


def efficient_forward(_kernels: object, args: tuple[Any, ...], _result: Any) -> Script:
    """Make the seed and the offset first if they are on the GPU, then output and log-sum-exp.

    Wide values in half precision are added up in a buffer.
    """
    query, _, value = args[:3]
    script: Script = (Make((2, 3)), OUTPUTS)
    if query.dtype not in _HALF or value.shape[-1] <= _WIDE:
        return script
    num_bytes = 4 * math.prod(query.shape[:-1]) * value.shape[-1]
    return (*script, Workspace(name="output in fp32", num_bytes=num_bytes))


def with_state_on_host(outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return efficient attention's outputs with seed and offset in host memory.

    Source: `_efficient_attention_forward` in aten/src/ATen/native/transformers/cuda/attention.cu
        before torch 2.14: the device of the two is the CPU unless a CUDA graph is captured.
    """
    output, log_sum_exp, *state = outputs
    on_host = (torch.empty_like(tensor, device="cpu") for tensor in state)
    return (output, log_sum_exp, *on_host)


def efficient_backward(_kernels: object, args: tuple[Any, ...], _result: Any) -> Script:
    """Take the sum of each row of (gradient x output), and a buffer for gradients in fp32.

    In half precision, the kernel computes the sums itself.
    """
    _, query, key, value, *_ = args
    samples, heads, num_queries, head_dim = query.shape
    rows = 4 * samples * heads * num_queries
    is_half = query.dtype in _HALF
    dropout = args[8] if len(args) > 8 and isinstance(args[8], float) else 0.0  # noqa: PLR2004
    numbers = (
        samples * heads,
        num_queries,
        key.shape[-2],
        head_dim,
        value.shape[-1],
        int(is_half),
        int(dropout > 0),
    )
    buffer = Workspace(
        name="efficient attention's gradients in fp32",
        need=Need(rule=_efficient_bytes, numbers=numbers),
    )
    row_sums = Workspace(name="attention's row sums", num_bytes=rows)
    if is_half:
        return (OUTPUTS, row_sums, buffer, Drop.of(row_sums.name, buffer.name))
    value_dim = value.shape[-1]
    product = query.new_empty((samples, num_queries, heads, value_dim))
    script: Script = (
        OUTPUTS,
        Workspace(name="gradient x output", num_bytes=rows * value_dim),
        Workspace(name="row sums in another order", num_bytes=rows),
        *reduction_scratch(product, (-1,)),
    )
    if heads > 1:
        script += (row_sums, Drop.of("row sums in another order"))
    return (*script, Drop.of("gradient x output"), buffer, Drop.of(row_sums.name))


def _efficient_bytes(  # noqa: PLR0917 - the numbers of a `Need`
    gpu: Gpu,
    num_heads: int,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    value_dim: int,
    is_half: int,
    has_dropout: int,
) -> int:
    """Return the buffer in which gradients are added up in fp32."""
    rows, columns, in_registers = _blocks(
        gpu, max(head_dim, value_dim), is_half=bool(is_half), has_dropout=bool(has_dropout)
    )
    splits = -(-num_keys // columns)
    if num_heads >= _MANY_BLOCKS and num_keys <= 2 * columns:
        splits = 1
    elements = 0
    if is_half and not in_registers:
        splits = max(1, min(splits, _MOST_SPLITS // num_heads))
        widths = (math.ceil(dim / rows) * rows for dim in (head_dim, value_dim))
        elements += splits * columns * sum(widths)
    tiles = math.ceil(num_queries / rows) * math.ceil(head_dim / columns)
    elements += tiles * (rows * columns + _TILE_HEADER_BYTES // 4)
    return 4 * num_heads * (math.ceil(elements / 4) * 4)


def _blocks(gpu: Gpu, dim: int, *, is_half: bool, has_dropout: bool) -> tuple[int, int, bool]:
    """Return the kernel's block of queries and of keys, and whether it adds up in registers."""
    capability = gpu.compute_capability
    if dim <= 64:  # noqa: PLR2004
        return 64, 64, is_half
    if is_half and dim <= 96 and not has_dropout and capability in _SMALL_AMPERE:  # noqa: PLR2004
        return 128, 64, True
    is_large = capability in _HAS_LARGE_SHARED_MEMORY
    rows = 128 if is_large or (is_half and dim > _WIDE) else 64
    in_registers = is_half and dim <= rows
    return rows, 128 if in_registers and is_large else 64, in_registers


def flash_backward(_kernels: object, args: tuple[Any, ...], _result: Any) -> Script:
    """Take a scalar for each row and the query's gradient in fp32, padded to the kernel's tiles.

    A gradient or output that is not contiguous as (samples, rows, heads, head_dim) is copied.
    """
    gradient, query, _, _, output, *_ = args
    samples, heads, num_rows, head_dim = query.shape
    rows = samples * heads * _ceil(num_rows, _FLASH_ROWS)
    copies = tuple(
        Workspace.copy_of(tensor, name)
        for name, tensor in (("copy of the gradient", gradient), ("copy of the output", output))
        if not tensor.transpose(1, 2).is_contiguous()
    )
    return (
        *copies,
        OUTPUTS,
        Workspace(name="attention's row sums", num_bytes=4 * rows),
        Workspace(
            name="flash attention's gradient of queries",
            num_bytes=4 * rows * _ceil(head_dim, _FLASH_HEAD_DIMS),
        ),
    )


def _ceil(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
