"""Operators that read tensors of one layout, given gradients and inputs of others.

They are cases as those of `operator_cases`, which runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

_LAST = torch.channels_last
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


def _leaf(
    device: torch.device, *shape: int, dtype: torch.dtype, is_last: bool = False
) -> torch.Tensor:
    layout = _LAST if is_last else torch.contiguous_format
    made = torch.empty(shape, device=device, dtype=dtype, memory_format=layout)
    return made.requires_grad_()


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
    for is_last in (False, True):
        images = _leaf(device, 4, 64, 6, 6, dtype=dtype, is_last=is_last)
        narrow = _leaf(device, 8, 64, 1, 1, dtype=dtype, is_last=is_last)
        wide = _leaf(device, 64, 8, 1, 1, dtype=dtype, is_last=is_last)
        bias = _leaf(device, 64, dtype=dtype)
        for activate in (F.relu, F.silu, F.hardswish, F.relu6, F.leaky_relu):
            yield
            gate = activate(F.conv2d(images.mean((2, 3), keepdim=True), narrow))
            gate = F.conv2d(gate, wide, bias)
            yield
            output = images * (F.hardsigmoid(gate) if activate is F.hardswish else gate.sigmoid())
            yield
            output.backward(torch.empty_like(output))
            del gate, output


def gradients_of_norms(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Normalize batches and groups of both layouts, and give gradients of every layout back."""
    weight, bias = _leaf(device, 96, dtype=dtype), _leaf(device, 96, dtype=dtype)
    norms = nn.BatchNorm2d(96).to(device), nn.BatchNorm2d(96).to(device, dtype)
    for is_last in (False, True):
        images = _leaf(device, 8, 96, 14, 14, dtype=dtype, is_last=is_last)
        for normalize in (*norms, lambda data: F.group_norm(data, 8, weight, bias)):
            for gradient in _gradients_of(images):
                output = normalize(images)
                yield
                output.backward(gradient)
                yield
                del output
    for rows in (_leaf(device, 8, 96, dtype=dtype), _leaf(device, 70_000, 96, dtype=dtype)):
        norm_of_rows = nn.BatchNorm1d(96).to(device, dtype)
        yield
        output = norm_of_rows(rows)
        yield
        output.backward(torch.empty_like(output))
        del output


def pools(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Pool images, and a part of their channels, and give gradients of every layout back."""
    for is_last in (False, True):
        images = _leaf(device, 4, 64, 16, 16, dtype=dtype, is_last=is_last)
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
    for is_last in (False, True):
        images = _leaf(device, 4, 16, 12, 10, dtype=dtype, is_last=is_last).detach()
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
        table = _leaf(device, num_rows, 4, dtype=dtype)
        index = torch.empty(num_positions, dtype=torch.long, device=device)
        output = table[index]
        yield
        output.backward(torch.empty_like(output))
        del output
    for num_rows, num_positions in ((300, 3072), (300, 3076), (200, 12_800), (50_000, 20_000)):
        table = _leaf(device, num_rows, 64, dtype=dtype)
        index = torch.empty(4, num_positions // 4, dtype=torch.long, device=device)
        output = F.embedding(index, table)
        yield
        output.backward(torch.empty_like(output))
        del output
    table = _leaf(device, 100_000, dtype=dtype)
    index = torch.empty(5000, dtype=torch.long, device=device)
    output = table[index]
    yield
    output.backward(torch.empty(1, device=device, dtype=dtype).expand(5000))


def blurs(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Pad by reflection and convolve with filters that are not trained, of both layouts."""
    for is_last in (False, True):
        images = _leaf(device, 2, 32, 14, 14, dtype=dtype, is_last=is_last)
        for filters_last in (False, True):
            layout = _LAST if filters_last else torch.contiguous_format
            filters = torch.empty(32, 1, 3, 3, device=device, dtype=dtype)
            filters = filters.expand(32, 32, 3, 3).contiguous(memory_format=layout)
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
    for is_last in (False, True):
        images = _leaf(device, 2, 16, 12, 12, dtype=dtype, is_last=is_last)
        for size, padding in ((3, 1), (2, 0)):
            options = {"kernel_size": size, "padding": padding, "stride": 2}
            yield
            columns = F.unfold(images, **options)
            yield
            output = F.fold(columns, (12, 12), **options)
            yield
            output.backward(torch.empty_like(output))
            yield
            del columns, output


def products_of_one(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Outer products, and what comes before and after attention's."""
    column, row = _leaf(device, 4, 30, 1, dtype=dtype), _leaf(device, 4, 1, 40, dtype=dtype)
    yield
    torch.bmm(column, row)
    scores = _leaf(device, 4, 30, 40, dtype=dtype)
    output = scores.softmax(-1)
    yield
    output.backward(torch.empty(4, 40, 30, device=device, dtype=dtype).transpose(1, 2))
    output = scores.max(1)[0]
    yield
    output.backward(torch.empty_like(output))
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
    products_of_one,
)
