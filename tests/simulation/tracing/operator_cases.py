"""Operators whose requests to the allocator are compared with torch's own, in a rehearsed process.

Each case yields where a new stretch of it begins. `python operator_cases.py FILE` runs all of them
on the rehearsed card of its process.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import layout_cases
import torch
from layout_cases import backward, leaf
from torch import nn
from torch.nn import functional as F  # noqa: N812

Case = Callable[[torch.device], Iterator[None]]

# The size of a tensor that marks where a stretch begins. No case makes another one of it.
_MARK_BYTES = 12345
_LAST = torch.channels_last
_HALF = torch.bfloat16


_POOLS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda images: F.max_pool2d(images, 3, 2, 1),
    lambda images: F.adaptive_avg_pool2d(images, 4),
    lambda images: F.interpolate(images, scale_factor=2.0, mode="bilinear"),
    lambda images: F.pad(images, (1, 1, 1, 1), mode="reflect"),
)


_REDUCED: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((1576, 192), (0,)),
    ((8, 197, 192), (0, 1)),
    ((8, 192, 14, 14), (0, 2, 3)),
    ((33, 77), (0,)),
    ((100_000,), (0,)),
    ((512, 30_001), (1,)),
)
"""Shapes, and the dimensions that are reduced."""


def sums(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Sum and average along rows, columns and the channels of both layouts."""
    for shape, dims in _REDUCED:
        data = torch.empty(shape, device=device, dtype=dtype)
        yield
        data.sum(dims)
        yield
        data.mean(dims, keepdim=True)
    data = torch.empty(8, 192, 14, 14, device=device, dtype=dtype).to(memory_format=_LAST)
    yield
    data.sum((0, 2, 3))


def statistics(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Norms, variances and extremes along rows, columns and channels."""
    for shape, dims in (*_REDUCED, ((16, 56, 56, 80), (1, 2))):
        data = torch.empty(shape, device=device, dtype=dtype)
        for reduce in (
            lambda: torch.linalg.vector_norm(data, 2, dims),  # noqa: B023 - called at once
            lambda: torch.linalg.vector_norm(data, 2, dims, dtype=torch.float32),  # noqa: B023
            lambda: data.var(dims),  # noqa: B023
            lambda: torch.var_mean(data, dims, correction=0),  # noqa: B023
            lambda: data.std(dims),  # noqa: B023
            lambda: data.amax(dims),  # noqa: B023
            lambda: data.amin(dims),  # noqa: B023
            lambda: data.prod(dims[0]),  # noqa: B023
            lambda: torch.linalg.vector_norm(data),  # noqa: B023
        ):
            yield
            reduce()


def linears(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Linear layers of inputs with other layouts, with a bias and without one."""
    weight, bias = leaf(device, 64, 96, dtype=dtype), leaf(device, 64, dtype=dtype)
    tokens = leaf(device, 8, 96, 50, dtype=dtype)
    maps = leaf(device, 8, 96, 15, 15, dtype=dtype)
    for data in (
        tokens.transpose(1, 2),
        maps.permute(0, 2, 3, 1),
        leaf(device, 8, 7, 7, 96, dtype=dtype),
        leaf(device, 8, 50, 96, dtype=dtype),
    ):
        for added in (bias, None):
            yield
            output = F.linear(data, weight, added)
            yield
            backward(output)
            del output


def products(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Multiply with a bias, without one, in batches, and with matrices that have to be copied."""
    left = torch.empty(64, 128, device=device, dtype=dtype)
    right = torch.empty(128, 256, device=device, dtype=dtype)
    bias = torch.empty(256, device=device, dtype=dtype)
    many = torch.empty(4, 64, 128, device=device, dtype=dtype)
    others = torch.empty(4, 128, 32, device=device, dtype=dtype)
    yield
    left @ right
    yield
    torch.addmm(bias, left, right)
    yield
    torch.bmm(many, others)
    yield
    F.linear(left, right.t().contiguous(), bias)
    yield
    left[:, ::2] @ right[::2]
    yield
    torch.addmm(torch.empty(64, 256, device=device, dtype=dtype), left, right)


def attention(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Attend with narrow and wide heads, a mask, and one tensor for query, key and value."""
    for head_dim, is_masked in ((64, False), (64, True), (80, True), (192, True)):
        query, key, value = (leaf(device, 2, 3, 150, head_dim, dtype=dtype) for _ in range(3))
        mask = leaf(device, 1, 1, 150, 152, dtype=dtype)[..., :150] if is_masked else None
        yield
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        yield
        backward(output)
    packed = leaf(device, 2, 50, 3 * 3 * 64, dtype=dtype)
    yield
    query, key, value = packed.reshape(2, 50, 3, 3, 64).permute(2, 0, 3, 1, 4).unbind(0)
    output = F.scaled_dot_product_attention(query, key, value)
    yield
    backward(output.transpose(1, 2).reshape(2, 50, 192))


def kinds_of_attention(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Attend with few and many keys, shared keys, dropout, heads of other widths, no gradient."""
    kinds: tuple[tuple[int, int, int, int, int, dict[str, Any]], ...] = (
        (150, 150, 64, 64, 4, {"is_causal": True}),
        (50, 100, 64, 64, 4, {}),
        (1, 300, 64, 64, 4, {}),
        (300, 1, 64, 64, 4, {}),
        (150, 150, 64, 64, 2, {}),
        (50, 100, 64, 64, 2, {"is_masked": True}),
        (50, 100, 128, 128, 1, {"is_masked": True}),
        (150, 150, 64, 64, 4, {"dropout_p": 0.125}),
        (50, 100, 64, 64, 2, {"dropout_p": 0.125}),
        (50, 100, 64, 64, 4, {"dropout_p": 0.1}),
        (50, 100, 64, 32, 4, {}),
        (150, 150, 192, 128, 4, {}),
        (150, 150, 160, 160, 4, {}),
        (150, 200, 160, 160, 2, {"is_masked": True}),
        (150, 150, 256, 256, 4, {}),
        (50, 200, 256, 256, 2, {}),
    )
    for queries, keys, head_dim, value_dim, key_heads, options in kinds:
        is_grouped = key_heads < 4
        if is_grouped and "dropout_p" in options and torch.__version__ < "2.14":
            continue  # The math path, of whose dropout a trace keeps too much.
        query = leaf(device, 2, queries, 4, head_dim, dtype=dtype).transpose(1, 2)
        key = leaf(device, 2, keys, key_heads, head_dim, dtype=dtype).transpose(1, 2)
        value = leaf(device, 2, keys, key_heads, value_dim, dtype=dtype).transpose(1, 2)
        options["enable_gqa"] = is_grouped
        if options.pop("is_masked", False):
            options["attn_mask"] = torch.empty(queries, keys, device=device, dtype=dtype)
        yield
        output = F.scaled_dot_product_attention(query, key, value, **options)
        yield
        backward(output)
        if "dropout_p" in options:
            continue  # There is none in an evaluation.
        yield
        with torch.no_grad():
            output = F.scaled_dot_product_attention(query, key, value, **options)


def norms(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Normalize layers of other layouts, groups, and batches large enough for many blocks."""
    weight, bias = leaf(device, 96, dtype=dtype), leaf(device, 96, dtype=dtype)
    tokens = leaf(device, 8, 96, 49, dtype=dtype)
    rows = leaf(device, 70_000, 96, dtype=dtype)
    for data in (tokens.transpose(1, 2), rows):
        yield
        output = F.layer_norm(data, (96,), weight, bias)
        yield
        backward(output)
    for layout in (torch.contiguous_format, _LAST):
        images = leaf(device, 8, 96, 56, 56, dtype=dtype, layout=layout)
        norm = nn.BatchNorm2d(96).to(device)
        yield
        output = F.group_norm(images, 8, weight, bias)
        yield
        backward(output)
        yield
        output = norm(images)
        yield
        backward(output)


def rms_norms(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Normalize by the root mean square: tokens in two orders, NHWC, and many short rows."""
    unlike = _HALF if dtype is torch.float32 else torch.float32
    weight, other = leaf(device, 96, dtype=dtype), leaf(device, 96, dtype=unlike)
    tokens, rows = leaf(device, 8, 96, 49, dtype=dtype), leaf(device, 70_000, 96, dtype=dtype)
    images = leaf(device, 8, 3, 56, 96, dtype=dtype, layout=_LAST)
    for data, scale in (
        (tokens.transpose(1, 2), weight),
        (tokens.transpose(1, 2).contiguous(), None),
        (rows, weight),
        (rows, other),
        (images, weight),
    ):
        yield
        output = F.rms_norm(data, (96,), scale)
        yield
        backward(output)
        yield
        output.sum(-1).relu()
    yield
    output = F.rms_norm(tokens.transpose(1, 2).contiguous(), (96,), weight).transpose(1, 2)
    yield
    output.backward(torch.empty(8, 96, 49, device=device, dtype=dtype))
    yield
    with torch.no_grad():
        output = F.rms_norm(rows, (96,), weight)


def depthwise(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Convolve each channel, and give gradients of both layouts back."""
    data = leaf(device, 8, 96, 16, 16, dtype=dtype)
    weight, bias = leaf(device, 96, 1, 7, 7, dtype=dtype), leaf(device, 96, dtype=dtype)
    yield
    output = F.conv2d(data, weight, bias, padding=3, groups=96)
    yield
    backward(output)
    yield
    output = F.conv2d(data, weight, bias, padding=3, groups=96)
    yield
    output.permute(0, 2, 3, 1).backward(torch.empty(8, 16, 16, 96, device=device, dtype=dtype))


def parts(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Convolve a part of the channels, and give gradients of every layout back."""
    weight = leaf(device, 32, 32, 3, 3, dtype=dtype)
    for layout in (torch.contiguous_format, _LAST):
        images = leaf(device, 4, 96, 15, 15, dtype=dtype, layout=layout)
        made = torch.empty(4, 96, 15, 15, device=device, dtype=dtype).to(memory_format=layout)
        gradients = (
            made[:, :32],
            torch.empty(4, 15, 15, 32, device=device, dtype=dtype).permute(0, 3, 1, 2),
            torch.empty(4, 32, 15, 15, device=device, dtype=dtype),
            torch.empty(4, 32, 1, 1, device=device, dtype=dtype).expand(4, 32, 15, 15),
        )
        for gradient in gradients:
            output = F.conv2d(images[:, :32], weight, padding=1)
            yield
            output.backward(gradient)
            yield
            del output


def others(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Softmax, dropout, rolls, gathers and pools."""
    data = leaf(device, 8, 30, 64, dtype=dtype)
    yield
    output = F.softmax(data, -1)
    yield
    backward(output)
    for dtype_of_result in (None, torch.float32):
        yield
        output = F.softmax(data.transpose(1, 2), -1, dtype=dtype_of_result)
        yield
        backward(output)
    yield
    F.dropout(data, 0.1)
    yield
    output = torch.roll(data, (1, 2), (1, 2))
    yield
    backward(output)
    index = torch.empty(8, 30, 64, device=device, dtype=torch.long)
    yield
    backward(data.gather(1, index))
    for layout in (torch.contiguous_format, _LAST):
        images = leaf(device, 8, 64, 15, 15, dtype=dtype, layout=layout)
        for pool in _POOLS:
            yield
            output = pool(images)
            yield
            backward(output)


def optimizers(device: torch.device, _dtype: torch.dtype) -> Iterator[None]:
    """Lists of tensors, in the first step and in the second."""
    for name in ("AdamW", "SGD", "RMSprop"):
        parameters = [leaf(device, 300, 300), leaf(device, 300), leaf(device, 64, 3, 7, 7)]
        optimizer = getattr(torch.optim, name)(parameters, lr=0.1, weight_decay=0.01)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            yield
            optimizer.step()
            yield
            optimizer.zero_grad()
        del optimizer


CASES = {
    f"{case.__name__} {str(dtype).rpartition('.')[2]}": (case, dtype)
    for case in (
        sums,
        statistics,
        linears,
        products,
        attention,
        kinds_of_attention,
        norms,
        rms_norms,
        depthwise,
        parts,
        others,
        optimizers,
        *layout_cases.CASES,
    )
    for dtype in (torch.float32, _HALF)
}


def run(name: str, device: torch.device, mark: Callable[[], object]) -> None:
    """Run a case, and mark where each stretch of it begins and where the last one ends."""
    case, dtype = CASES[name]
    steps = case(device, dtype)
    mark()
    for _ in steps:
        mark()
    mark()


def recorded() -> dict[str, list[list[tuple[int, int]]]]:
    """Run all cases on the rehearsed card, and return what each stretch asked for and gave back."""
    device = torch.device("cuda")
    memory: Any = torch.cuda.memory
    square = torch.zeros(64, 64, device=device, requires_grad=True)
    # Before torch 2.15, the first products of forward and backward take workspaces that are kept.
    F.linear(square @ square, square, square[0]).sum().backward()
    found = {}
    for name in CASES:
        memory._record_memory_history(max_entries=10**6, context=None)
        run(name, device, lambda: torch.empty(_MARK_BYTES, dtype=torch.uint8, device=device))
        entries = memory._snapshot()["device_traces"][0]
        memory._record_memory_history(enabled=None)
        gc.collect()
        found[name] = _stretches(entries)
    return found


def _stretches(entries: list[dict[str, Any]]) -> list[list[tuple[int, int]]]:
    stretches: list[list[tuple[int, int]]] = []
    marked = None
    sizes: dict[int, int] = {}
    for entry in entries:
        action, address, num_bytes = entry["action"], entry["addr"], entry["size"]
        if action == "alloc" and num_bytes == _MARK_BYTES:
            stretches.append([])
            marked = address
        elif action == "free_completed" and address == marked:
            marked = None
        elif action == "alloc":
            sizes[address] = num_bytes
            stretches[-1].append((1, num_bytes))
        elif action == "free_completed" and address in sizes:
            stretches[-1].append((-1, sizes.pop(address)))
    return stretches


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(recorded()))
    sys.stdout.flush()
    os._exit(0)
