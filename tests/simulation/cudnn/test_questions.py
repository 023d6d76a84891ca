"""Which convolutions cuDNN gives to cuBLASLt, held against a real card."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

from memfit.simulation.cudnn.questions import Convolution, ConvolutionKernel

MEASURED = Path(__file__).parents[3] / "benchmarks" / "data" / "h100-convolutions.csv"
KERNELS = tuple(ConvolutionKernel)
FEW_BYTES = 400


def pointwise(
    kernel: ConvolutionKernel,
    *,
    pixels: tuple[int, int] = (14, 14),
    channels: int = 256,
    filters: int = 64,
    dtype: str = "bfloat16",
    stride: int = 1,
    is_channels_last: bool = False,
) -> Convolution:
    return Convolution(
        kernel=kernel,
        dtype=dtype,
        is_channels_last=is_channels_last,
        input_shape=(16, channels, *pixels),
        weight_shape=(filters, channels, 1, 1),
        output_shape=(16, filters, *pixels),
        padding=(0, 0),
        stride=(stride, stride),
        dilation=(1, 1),
    )


def product_bytes(convolution: Convolution) -> int | None:
    """Return the workspace of a convolution of its own shapes as a product."""
    return convolution.product_bytes(convolution.input_shape, convolution.weight_shape)


def measured() -> list[tuple[Convolution, int]]:
    """Return the 1x1 convolutions of a real card, and the workspace that torch took for each."""
    with MEASURED.open(encoding="utf-8") as file:
        file.readline()
        rows = list(csv.DictReader(file))
    found = []
    for row in rows:
        image, weight = (tuple(map(int, row[name].split("x"))) for name in ("input", "weight"))
        if weight[1:] != (image[1], 1, 1) or row["stride"] != "1x1" or image[2:] == (1, 1):
            continue
        for kernel in KERNELS:
            plain = pointwise(kernel, channels=image[1], filters=weight[0], dtype=row["dtype"])
            output = (image[0], weight[0], *image[2:])
            sized = dataclasses.replace(plain, input_shape=image, output_shape=output)
            found.append((sized, int(row[kernel.value])))
    return found


def test_products_are_those_of_a_real_card() -> None:
    """Where the rule names a product, torch took its workspace in 1,919 of 2,073 kernels."""
    named = [
        abs(said - taken) <= FEW_BYTES
        for convolution, taken in measured()
        if (said := product_bytes(convolution)) is not None
    ]
    assert (sum(named), len(named)) == (1919, 2073)


def test_only_plain_nchw_convolutions_are_products() -> None:
    """Another layout, a stride, padding or a single pixel: cuDNN's own engines."""
    forward = ConvolutionKernel.FORWARD
    assert product_bytes(pointwise(forward)) == 0
    assert product_bytes(pointwise(forward, is_channels_last=True)) is None
    assert product_bytes(pointwise(forward, stride=2)) is None
    assert product_bytes(pointwise(forward, pixels=(1, 1))) is None
    assert product_bytes(pointwise(forward, pixels=(7, 7))) is None
    assert product_bytes(pointwise(forward, pixels=(7, 7), dtype="float32")) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_filters_gradient_keeps_a_product_for_each_sample(dtype: str) -> None:
    """In fp32, whatever the tensors are in; not where the products outweigh the tensors."""
    wide = pointwise(ConvolutionKernel.FILTER, dtype=dtype)
    assert product_bytes(wide) == 16 * 256 * 64 * 4
    heavy = pointwise(
        ConvolutionKernel.FILTER, pixels=(7, 7), channels=2048, filters=512, dtype=dtype
    )
    assert product_bytes(heavy) is None
