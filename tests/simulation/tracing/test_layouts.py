"""What an elementwise operation makes has the strides that a kernel gives it.

A kernel on the CPU lays its output out as one on CUDA does: both iterate over tensors in the order
of their strides. The meta device does not: it decomposes some operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from memfit.simulation.tracing.memory_formats import suggested_format
from memfit.simulation.tracing.outputs import outputs

aten = torch.ops.aten
SIZES = (2, 8, 4, 6)
LAST = torch.channels_last

IMAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "NCHW": lambda made: made.new_zeros(SIZES),
    "NHWC": lambda made: made.new_zeros(SIZES).contiguous(memory_format=LAST),
    "expanded": lambda made: made.new_zeros(2, 8, 1, 1).expand(SIZES),
    "part": lambda made: made.new_zeros(2, 16, 4, 6)[:, :8],
    "part of NHWC": lambda made: made.new_zeros(2, 16, 4, 6).contiguous(memory_format=LAST)[:, :8],
    "transposed": lambda made: made.new_zeros(2, 8, 6, 4).transpose(2, 3),
}
ONE_PIXEL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "NCHW": lambda made: made.new_zeros(16).as_strided((2, 8, 1, 1), (8, 1, 1, 1)),
    "NHWC": lambda made: made.new_zeros(16).as_strided((2, 8, 1, 1), (8, 1, 8, 8)),
}
OF_ONE = {
    name: (getattr(aten, name).default, numbers)
    for name, numbers in {
        "gelu": (),
        "relu": (),
        "silu": (),
        "sigmoid": (),
        "tanh": (),
        "hardtanh": (),
        "hardswish": (),
        "hardsigmoid": (),
        "elu": (),
        "leaky_relu": (),
        "mish": (),
        "softplus": (),
        "sqrt": (),
        "rsqrt": (),
        "abs": (),
        "neg": (),
        "exp": (),
        "clamp": (0.0, 1.0),
    }.items()
} | {
    "a number added": (aten.add.Tensor, (1.0,)),
    "times a number": (aten.mul.Tensor, (2.0,)),
    "a power": (aten.pow.Tensor_Scalar, (2.0,)),
}
OF_TWO: dict[str, tuple[Any, Callable[[Any, Any], tuple[Any, ...]]]] = {
    name: (func, lambda one, other, numbers=numbers: (one, other, *numbers))
    for name, func, *numbers in (
        ("add", aten.add.Tensor),
        ("sub", aten.sub.Tensor),
        ("mul", aten.mul.Tensor),
        ("div", aten.div.Tensor),
        ("maximum", aten.maximum.default),
        ("minimum", aten.minimum.default),
        ("gelu", aten.gelu_backward.default),
        ("silu", aten.silu_backward.default),
        ("mish", aten.mish_backward.default),
        ("sigmoid", aten.sigmoid_backward.default),
        ("tanh", aten.tanh_backward.default),
        ("hardswish", aten.hardswish_backward.default),
        ("hardsigmoid", aten.hardsigmoid_backward.default),
        ("hardtanh", aten.hardtanh_backward.default, -1.0, 1.0),
        ("threshold", aten.threshold_backward.default, 0),
        ("leaky_relu", aten.leaky_relu_backward.default, 0.1, False),
        ("softplus", aten.softplus_backward.default, 1.0, 20.0),
    )
} | {"elu": (aten.elu_backward.default, lambda grad, data: (grad, 1.0, 1.0, 1.0, False, data))}


def made_on(device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layouts", [IMAGES, ONE_PIXEL], ids=["images", "one pixel"])
@pytest.mark.parametrize("name", OF_ONE)
def test_an_operation_on_one_tensor(name: str, layouts: Any, dtype: torch.dtype) -> None:
    func, numbers = OF_ONE[name]
    for layout, laid_out in layouts.items():
        kernel, traced = (laid_out(made_on(device, dtype)) for device in ("cpu", "meta"))
        expected = func(kernel, *numbers).stride()
        assert outputs(func, (traced, *numbers), {}).stride() == expected, layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layouts", [IMAGES, ONE_PIXEL], ids=["images", "one pixel"])
@pytest.mark.parametrize("name", OF_TWO)
def test_an_operation_on_two_tensors(name: str, layouts: Any, dtype: torch.dtype) -> None:
    """Each layout with each other one, in this order."""
    func, arguments = OF_TWO[name]
    for first, lay_first in layouts.items():
        for second, lay_second in layouts.items():
            kernel, traced = (
                arguments(lay_first(made), lay_second(made))
                for made in (made_on(device, dtype) for device in ("cpu", "meta"))
            )
            expected = func(*kernel).stride()
            assert outputs(func, traced, {}).stride() == expected, (first, second)


def test_a_counter_on_the_cpu_has_its_value() -> None:
    """A step may read it, as an optimizer reads the number of its steps."""
    steps = torch.tensor(9.0)
    assert outputs(aten.sqrt.default, (steps,), {}).item() == 3
    assert outputs(aten.mul.Tensor, (steps, 2.0), {}).item() == 18


def test_the_format_is_what_torch_suggests() -> None:
    """Strides decide, also where a tensor is contiguous in both formats."""
    for layout, laid_out in (*IMAGES.items(), *ONE_PIXEL.items()):
        data = laid_out(made_on("cpu", torch.float32))
        assert (suggested_format(data) is LAST) == layout.endswith("NHWC"), layout
