"""What the kernels of attention take from the allocator besides their outputs.

Source: aten/src/ATen/native/transformers/cuda/attention_backward.cu, the kernel's parameters in
    mem_eff_attention/kernel_backward.h and their choice in mem_eff_attention/kernels/
    generate_kernels.py, flash_attn/flash_api.cpp, and aten/src/ATen/native/cudnn/MHA.cpp.

cuDNN does not say without a driver what its attention takes. Its frontend adds up most of it in the
open (`include/cudnn_frontend/node/scaled_dot_product_flash_attention.h`): backward takes a buffer
for the query's gradient in fp32, a sum for each row, and gradients of keys and values with as many
heads as the query has. What plans take besides is what cuDNN 9.19 and 9.26 ask for on a rehearsed
H100 and B200, for 250 shapes.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch

from memfit.cards import Gpu
from memfit.simulation.needs import Need
from memfit.simulation.tracing.reductions import reduction_scratch
from memfit.simulation.tracing.scripts import OUTPUTS, Drop, Make, Release, Script, Workspace

__all__ = [
    "RANDOM_STATE_ON_GPU",
    "cudnn_backward",
    "cudnn_forward",
    "cudnn_outputs",
    "efficient_backward",
    "efficient_forward",
    "flash_backward",
    "flash_forward",
    "safe_softmax",
    "with_state_on_host",
]

RANDOM_STATE_ON_GPU: Final = (2, 14)
"""The release of torch since which efficient attention keeps its seed and offset on the GPU."""

_HALF: Final = (torch.float16, torch.bfloat16)
_FLASH_ROWS: Final = 128
# Seen in rehearsals: since torch 2.11 (2.9 not yet), a head of 160 is computed as one of 192.
_WIDER_TILES_SINCE: Final = (2, 11)
_FLASH_QUERIES: Final = 64
# The keys of a block, up to a head dimension.
_FLASH_KEYS: Final = ((64, 256), (128, 128), (256, 64))
_FLASH_MOST_SPLITS: Final = 128
# Keys are not split if this share of the card is busy, and into the fewest parts that are nearly
# as good as the best.
_FILLS: Final = 0.8
_FILLS_ENOUGH: Final = 0.85
_STATE_BYTES: Final = 16
# What precedes each tile of the query's gradient: a lock, a counter and padding.
_TILE_HEADER_BYTES: Final = 16
# Of cuDNN's plans: the workspace of any plan on Hopper. On Blackwell, where workspaces begin, tiles
# of the mask, up to how many keys the query's gradient has a second buffer, and the head dimension
# after which a plan splits differently.
_BLACKWELL: Final = (10, 0)
_PLAN_BYTES: Final = 256
_ROOM_BYTES: Final = 128
_TILE: Final = 128
_FEW_KEYS: Final = 128
_SPLIT_HEAD: Final = 192
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
    if query.dtype not in _HALF or max(query.shape[-1], value.shape[-1]) <= _WIDE:
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
    gradient, query, key, value, *_ = args
    copies = _copies_by_rows(gradient=gradient)
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
    grouped = _gradients_of_each_head(heads, key, value)
    if is_half:
        ends = Drop.of(row_sums.name, buffer.name)
        return (*copies, OUTPUTS, *grouped, row_sums, buffer, ends)
    value_dim = value.shape[-1]
    product = query.new_empty((samples, num_queries, heads, value_dim))
    unordered = Workspace(name="row sums in another order", num_bytes=rows)
    script: Script = (
        *copies,
        OUTPUTS,
        *grouped,
        Workspace(name="gradient x output", num_bytes=rows * value_dim),
        unordered,
        *reduction_scratch(product, (-1,)),
    )
    if heads > 1 and num_queries > 1:
        script += (row_sums, Drop.of(unordered.name))
    else:
        row_sums = unordered
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


def safe_softmax(_kernels: object, args: tuple[Any, ...], _result: Any) -> Script:
    """Look for rows in which all is masked, of the math path's softmax, and make them zero."""
    scores = args[0]
    masked = Workspace(name="masked scores", num_bytes=scores.numel())
    rows = Workspace(name="masked rows", num_bytes=scores.numel() // max(1, scores.shape[-1]))
    zero = Workspace(name="zero", num_bytes=scores.element_size())
    return (OUTPUTS, masked, rows, zero, Drop.of(zero.name, rows.name, masked.name))


def flash_forward(kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Split the keys if the queries do not fill the card, and take a place for the random state.

    A split has an output and a log-sum-exp of its own, in fp32.
    """
    query, key, _, *others = args
    if any(others[:1]):  # Dropout: keys are not split.
        state = Workspace(name="attention's random state", num_bytes=_STATE_BYTES)
        return (Make((0, 1)), state, OUTPUTS)
    samples, heads, num_queries, head_dim = query.shape
    parts = ("log-sum-exp", 1), ("output", _flash_width(kernels, head_dim))
    splits = tuple(
        Workspace(
            name=f"{name} of each split",
            need=Need(
                rule=_flash_split_bytes,
                numbers=(samples * heads, num_queries, key.shape[2], head_dim, width),
            ),
        )
        for name, width in parts
    )
    return (Make((0, 1)), *splits, OUTPUTS, Drop.of(*(split.name for split in splits)))


def _flash_split_bytes(  # noqa: PLR0917 - the numbers of a `Need`
    gpu: Gpu, num_heads: int, num_queries: int, num_keys: int, head_dim: int, width: int
) -> int:
    splits = _flash_splits(gpu, num_heads, num_queries, num_keys, head_dim)
    return 4 * splits * num_heads * num_queries * width if splits > 1 else 0


def _flash_splits(gpu: Gpu, num_heads: int, num_queries: int, num_keys: int, head_dim: int) -> int:
    """Return into how many parts the keys are split (`num_splits_heuristic`)."""
    room = 2 * gpu.multiprocessors
    blocks = num_heads * -(-num_queries // _FLASH_QUERIES)
    columns = next(columns for most, columns in _FLASH_KEYS if head_dim <= most)
    key_blocks = -(-num_keys // columns)
    most = min(_FLASH_MOST_SPLITS, room, key_blocks)
    if blocks >= _FILLS * room or most <= 1:
        return 1
    shares = [-(-key_blocks // splits) for splits in range(1, most + 1)]
    used = {
        splits: (waves := blocks * splits / room) / math.ceil(waves)
        for splits in range(1, most + 1)
        if splits == 1 or shares[splits - 1] != shares[splits - 2]
    }
    enough = _FILLS_ENOUGH * max(used.values())
    return next(splits for splits, share in used.items() if share >= enough)


def flash_backward(kernels: Release, args: tuple[Any, ...], _result: Any) -> Script:
    """Take a scalar for each row and the query's gradient in fp32, padded to the kernel's tiles."""
    gradient, query, key, value, output, *_ = args
    samples, heads, num_rows, head_dim = query.shape
    rows = samples * heads * _ceil(num_rows, _FLASH_ROWS)
    return (
        *_copies_by_rows(gradient=gradient, output=output),
        OUTPUTS,
        Workspace(name="attention's row sums", num_bytes=4 * rows),
        Workspace(
            name="flash attention's gradient of queries",
            num_bytes=4 * rows * _flash_width(kernels, head_dim),
        ),
        *_gradients_of_each_head(heads, key, value),
    )


def _flash_width(kernels: Release, head_dim: int) -> int:
    """Return the head dimension that the kernel computes with."""
    is_older = kernels.torch_release < _WIDER_TILES_SINCE
    return _ceil(head_dim, 32 if head_dim <= (192 if is_older else _WIDE) else 64)


def _copies_by_rows(**tensors: torch.Tensor) -> tuple[Workspace, ...]:
    """Return copies of what is not contiguous as (samples, rows, heads, head_dim)."""
    return tuple(
        Workspace.copy_of(tensor, f"copy of the {name}")
        for name, tensor in tensors.items()
        if not tensor.transpose(1, 2).is_contiguous()
    )


def _gradients_of_each_head(
    heads: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[Workspace, ...]:
    """Return the gradients that heads get which share keys. They are added up at the end."""
    return tuple(
        Workspace(
            name=f"gradient of each head's {name}",
            num_bytes=heads * math.prod(tensor.shape) // tensor.shape[1] * tensor.element_size(),
        )
        for name, tensor in (("keys", key), ("values", value))
        if tensor.shape[1] != heads
    )


def cudnn_outputs(outputs: tuple[Any, ...], *, saves: bool) -> tuple[Any, ...]:
    """Return the outputs of cuDNN's attention. Without a backward there is no log-sum-exp."""
    if saves:
        return outputs
    output, log_sum_exp, *others = outputs
    return (output, log_sum_exp.new_empty(0), *others)


def cudnn_forward(_kernels: object, args: tuple[Any, ...], _result: Any) -> Script:
    """Make the seed and the offset first, then the outputs, and take the workspace of the plan."""
    query, key, _, _, _, *others = args
    samples, heads, num_queries, _ = query.shape
    need = Need(
        rule=_cudnn_forward_bytes,
        numbers=(samples * heads, num_queries, key.shape[2], int(any(others[:1]))),
    )
    return (Make((6, 7)), OUTPUTS, Workspace(name="attention's workspace", need=need))


def _cudnn_forward_bytes(
    gpu: Gpu, num_heads: int, num_queries: int, num_keys: int, has_dropout: int
) -> int:
    if gpu.compute_capability < _BLACKWELL:
        return _PLAN_BYTES if num_queries > 1 else 0
    return _dropped_bytes(num_heads, num_queries, num_keys) + _ROOM_BYTES if has_dropout else 0


def cudnn_backward(_kernels: object, args: tuple[Any, ...], _result: Any) -> Script:
    """Take one workspace, after the gradients. What comes in by columns is copied first.

    Source: `run_cudnn_SDP_bprop` in aten/src/ATen/native/cudnn/MHA.cpp.
    """
    gradient, query, key, value = args[:4]
    dropout = args[13]
    samples, heads, num_queries, head_dim = query.shape
    numbers = (
        samples * heads,
        num_queries,
        key.shape[2],
        head_dim,
        value.shape[3],
        int(key.shape[1] != heads),
        int(dropout > 0),
    )
    need = Need(rule=_cudnn_backward_bytes, numbers=numbers)
    workspace = Workspace(name="attention's workspace", need=need)
    is_by_rows = gradient.stride(-1) == 1
    copies = () if is_by_rows else (Workspace.copy_of(gradient, "copy of the gradient"),)
    return (OUTPUTS, *copies, workspace, Drop.of(workspace.name))


def _cudnn_backward_bytes(  # noqa: PLR0917 - the numbers of a `Need`
    gpu: Gpu,
    num_heads: int,
    num_queries: int,
    num_keys: int,
    head_dim: int,
    value_dim: int,
    is_grouped: int,
    has_dropout: int,
) -> int:
    """Return the buffers of the frontend and the plan's workspace."""
    rows = 4 * num_heads * num_queries
    each_head = 2 * num_heads * num_keys * (head_dim + value_dim) if is_grouped else 0
    if gpu.compute_capability < _BLACKWELL:
        return rows * (head_dim + 1) + each_head + _PLAN_BYTES
    if head_dim > _SPLIT_HEAD:
        # It has no buffer for the query's gradient, and one in fp32 for grouped keys and values.
        return rows + (3 * each_head + _ROOM_BYTES if is_grouped else 0)
    plan = 0
    if has_dropout:
        plan = _dropped_bytes(num_heads, num_queries, num_keys)
    elif num_keys <= _FEW_KEYS and head_dim <= _WIDE:
        plan = 4 * num_heads * _ceil(num_queries, 8) * head_dim
    return rows * (head_dim + 1) + each_head + plan + (_ROOM_BYTES if plan or is_grouped else 0)


def _dropped_bytes(num_heads: int, num_queries: int, num_keys: int) -> int:
    """Return the mask of dropout, a bit for each probability, in whole tiles."""
    return num_heads * _ceil(num_queries, _TILE) * _ceil(num_keys, _TILE) // 8


def _ceil(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
