"""Operators that read tensors of one layout, given gradients and inputs of others.

They are cases as those of `operator_cases`, which runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

_LAST = torch.channels_last
_LAYOUTS = (torch.contiguous_format, _LAST)
_aten = torch.ops.aten

_ACTIVATIONS_BACKWARD: tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ...] = (
    _aten.gelu_backward,
    _aten.hardsigmoid_backward,
    _aten.hardswish_backward,
    _aten.sigmoid_backward,
    _aten.silu_backward,
    lambda gradient, data: _aten.elu_backward(gradient, 1.0, 1.0, 1.0, False, data),
    lambda gradient, data: _aten.hardtanh_backward(gradient, data, -1.0, 1.0),
    lambda gradient, data: _aten.leaky_relu_backward(gradient, data, 0.1, False),
    lambda gradient, data: _aten.softplus_backward(gradient, data, 1.0, 20.0),
    lambda gradient, data: _aten.threshold_backward(gradient, data, 0.0),
)

# Each with its gradient, and the arguments after the sizes.
_RESIZES: tuple[tuple[Any, Any, tuple[bool, ...]], ...] = (
    (_aten.upsample_nearest2d, _aten.upsample_nearest2d_backward, ()),
    (_aten._upsample_nearest_exact2d, _aten._upsample_nearest_exact2d_backward, ()),
    (_aten.upsample_bilinear2d, _aten.upsample_bilinear2d_backward, (False,)),
    (_aten.upsample_bicubic2d, _aten.upsample_bicubic2d_backward, (False,)),
    (_aten._upsample_bilinear2d_aa, _aten._upsample_bilinear2d_aa_backward, (False,)),
    (_aten._upsample_bicubic2d_aa, _aten._upsample_bicubic2d_aa_backward, (False,)),
)


def leaf(device: torch.device, *shape: int, **options: Any) -> torch.Tensor:
    """Return a tensor without values that requires a gradient."""
    layout = options.pop("layout", torch.contiguous_format)
    tensor = torch.empty(*shape, device=device, **options)
    return tensor.to(memory_format=layout).requires_grad_()


def backward(output: torch.Tensor) -> None:
    """Run backward from any gradient."""
    output.backward(torch.empty_like(output))


def _gradients_of(output: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield gradients of images, of every layout."""
    samples, channels, height, width = output.shape
    yield torch.empty_like(output, memory_format=torch.contiguous_format)
    yield torch.empty_like(output, memory_format=_LAST)
    yield output.new_empty(samples, channels, 1, 1).expand(output.shape)
    yield output.new_empty(samples, 2 * channels, height, width)[:, :channels]
    yield output.new_empty(samples, channels, width, height).transpose(2, 3)


def one_pixel(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Squeeze and excite: images of one pixel are contiguous in both layouts."""
    for layout in _LAYOUTS:
        images = leaf(device, 4, 64, 6, 6, dtype=dtype, layout=layout)
        narrow = leaf(device, 8, 64, 1, 1, dtype=dtype, layout=layout)
        wide = leaf(device, 64, 8, 1, 1, dtype=dtype, layout=layout)
        bias = leaf(device, 64, dtype=dtype)
        for activate in (F.relu, F.silu, F.hardswish, F.relu6, F.leaky_relu):
            yield
            gate = activate(F.conv2d(images.mean((2, 3), keepdim=True), narrow))
            gate = F.conv2d(gate, wide, bias)
            yield
            output = images * (F.hardsigmoid(gate) if activate is F.hardswish else gate.sigmoid())
            yield
            backward(output)
            del gate, output


def gradients_of_norms(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Normalize batches and groups of both layouts, and give gradients of every layout back."""
    weight, bias = leaf(device, 96, dtype=dtype), leaf(device, 96, dtype=dtype)
    norms = nn.BatchNorm2d(96).to(device), nn.BatchNorm2d(96).to(device, dtype)
    for layout in _LAYOUTS:
        images = leaf(device, 8, 96, 14, 14, dtype=dtype, layout=layout)
        for normalize in (*norms, lambda data: F.group_norm(data, 8, weight, bias)):
            for gradient in _gradients_of(images):
                output = normalize(images)
                yield
                output.backward(gradient)
                yield
                del output
    for rows in (leaf(device, 8, 96, dtype=dtype), leaf(device, 70_000, 96, dtype=dtype)):
        norm_of_rows = nn.BatchNorm1d(96).to(device, dtype)
        yield
        output = norm_of_rows(rows)
        yield
        backward(output)
        del output


def pools(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Pool images, and a part of their channels, and give gradients of every layout back."""
    for layout in _LAYOUTS:
        images = leaf(device, 4, 64, 16, 16, dtype=dtype, layout=layout)
        for data in (images, images[:, :32]):
            for pool in (F.max_pool2d, F.avg_pool2d):
                for gradient in _gradients_of(pool(data, 2)):
                    yield
                    output = pool(data, 2)
                    yield
                    output.backward(gradient)
                    yield
                    del output


def activations(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute gradients of activations, and lay each out in both layouts.

    The operators are called here, because autograd's thread would give memory back in its own time.
    """
    for layout in _LAYOUTS:
        images = leaf(device, 4, 16, 12, 10, dtype=dtype, layout=layout).detach()
        for gradient in _gradients_of(images):
            for call in _ACTIVATIONS_BACKWARD:
                made = call(gradient, images)
                yield
                made.contiguous(memory_format=_LAST)
                yield
                made.contiguous()
                yield
                del made


def positions(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Index few and many rows, at few and many positions, which the gradient sorts."""
    for num_rows, num_positions in ((49, 49), (49, 2401), (3000, 2304), (3000, 20_000)):
        table = leaf(device, num_rows, 4, dtype=dtype)
        index = torch.empty(num_positions, dtype=torch.long, device=device)
        output = table[index]
        yield
        backward(output)
        del output
    for num_rows, num_positions in ((300, 3072), (300, 3076), (200, 12_800), (50_000, 20_000)):
        table = leaf(device, num_rows, 64, dtype=dtype)
        index = torch.empty(4, num_positions // 4, dtype=torch.long, device=device)
        output = F.embedding(index, table)
        yield
        backward(output)
        del output
    table = leaf(device, 100_000, dtype=dtype)
    index = torch.empty(5000, dtype=torch.long, device=device)
    output = table[index]
    yield
    output.backward(torch.empty(1, device=device, dtype=dtype).expand(5000))


def blurs(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Pad by reflection and convolve with filters that are not trained, of both layouts."""
    for layout in _LAYOUTS:
        images = leaf(device, 2, 32, 14, 14, dtype=dtype, layout=layout)
        for filters_in in _LAYOUTS:
            filters = torch.empty(32, 1, 3, 3, device=device, dtype=dtype)
            filters = filters.expand(32, 32, 3, 3).contiguous(memory_format=filters_in)
            for gradient in _gradients_of(images):
                yield
                padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
                yield
                output = F.conv2d(padded, filters)
                yield
                output.backward(gradient)
                yield
                del padded, output


def folds(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Unfold into more and into as much, and fold again."""
    for layout in _LAYOUTS:
        images = leaf(device, 2, 16, 12, 12, dtype=dtype, layout=layout)
        for size, padding in ((3, 1), (2, 0)):
            options = {"kernel_size": size, "padding": padding, "stride": 2}
            yield
            columns = F.unfold(images, **options)
            yield
            output = F.fold(columns, (12, 12), **options)
            yield
            backward(output)
            yield
            del columns, output


def gradients_of_attention(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Give attention gradients that lie head by head, or column by column as images do."""
    query, key, value = (leaf(device, 2, 4, 50, 64, dtype=dtype) for _ in range(3))
    mask = torch.empty(1, 1, 50, 56, device=device, dtype=dtype)[..., :50]
    whole = torch.empty(2, 4, 50, 64, device=device, dtype=dtype)
    columns = torch.empty(2, 4, 64, 50, device=device, dtype=dtype).transpose(2, 3)
    for given in (None, mask):
        for gradient in (whole, columns):
            yield
            output = F.scaled_dot_product_attention(query, key, value, attn_mask=given)
            yield
            output.backward(gradient)
            yield
            del output


def interpolations(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Resize images of few and many channels, and parts of them, and give any gradient back.

    The operators are called here, as those of activations are.
    """
    for channels, size in ((3, 16), (4, 16), (15, 16), (16, 16), (16, 8)):
        small = torch.empty(2, channels, 8, 8, device=device, dtype=dtype)
        large = torch.empty(2, channels, size, size, device=device, dtype=dtype)
        for resize, resize_backward, options in _RESIZES:
            for images in _gradients_of(small):
                yield
                made = resize(images, (size, size), *options)
                yield
                del made
            for gradient in _gradients_of(large):
                yield
                made = resize_backward(gradient, (size, size), small.shape, *options)
                yield
                del made


def lines(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Resize sequences, a part of them, and transposed ones."""
    sequences = torch.empty(2, 6, 8, device=device, dtype=dtype)
    for data in (sequences, sequences[:, :3], sequences.transpose(1, 2)):
        samples, channels, length = data.shape
        yield
        _aten.upsample_nearest1d(data, [16])
        yield
        _aten.upsample_linear1d(data, [16], False)
        yield
        _aten.upsample_nearest1d_backward(data, [length], [samples, channels, 4])
        yield
        _aten.upsample_linear1d_backward(data, [length], [samples, channels, 4], False)


def volumes(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Resize volumes of both layouts, and a part of one."""
    volume = torch.empty(2, 8, 4, 4, 4, device=device, dtype=dtype)
    for data in (volume, volume.contiguous(memory_format=torch.channels_last_3d), volume[:, :4]):
        shape, sizes = list(data.shape), [8, 8, 8]
        yield
        _aten.upsample_nearest3d(data, sizes)
        yield
        _aten.upsample_trilinear3d(data, sizes, False)
        yield
        _aten.upsample_nearest3d_backward(data, shape[2:], [*shape[:2], 2, 2, 2])
        yield
        _aten.upsample_trilinear3d_backward(data, shape[2:], [*shape[:2], 2, 2, 2], False)


def norms_of_lists(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Reduce each tensor of a list, as the clipping of gradients does."""
    large = torch.empty(1000, 700, device=device, dtype=dtype)
    turned = torch.empty(30, 50, device=device, dtype=dtype).t()
    for tensors in ([large], [large, *(large[0] for _ in range(200))], [turned, large]):
        for order in (1, 2, torch.inf):
            yield
            norms = torch._foreach_norm(tensors, order)
            yield
            del norms


def products_of_one(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Outer products, and what comes before and after attention's."""
    column, row = leaf(device, 4, 30, 1, dtype=dtype), leaf(device, 4, 1, 40, dtype=dtype)
    yield
    torch.bmm(column, row)
    scores = leaf(device, 4, 30, 40, dtype=dtype)
    output = scores.softmax(-1)
    yield
    output.backward(torch.empty(4, 40, 30, device=device, dtype=dtype).transpose(1, 2))
    output = scores.max(1)[0]
    yield
    backward(output)
    mask = torch.empty(4, 30, 40, device=device, dtype=torch.bool)
    yield
    mask.cumsum(1, dtype=torch.float32)
    yield
    2.0 ** scores.detach()


CASES = (
    one_pixel,
    gradients_of_norms,
    pools,
    activations,
    positions,
    blurs,
    folds,
    gradients_of_attention,
    interpolations,
    lines,
    volumes,
    norms_of_lists,
    products_of_one,
)
