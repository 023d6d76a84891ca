"""Sums that Hopper's kernels split over the card: against what cuDNN states, and a real H100."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest

from memfit.simulation.cudnn import splits
from memfit.simulation.cudnn.backend_api import CudnnError, Descriptors, load_cudnn
from memfit.simulation.cudnn.graphs import graph_of
from memfit.simulation.cudnn.plans import CudnnPlans, PlanSettings
from memfit.simulation.cudnn.questions import Convolution, ConvolutionKernel
from memfit.simulation.cudnn.splits import PlanOfCard, most_clusters, whole_card_bytes

HOPPER = (9, 0)
H100_MULTIPROCESSORS = 132
DESCRIBED = range(1, 19)  # what cuDNN lets a described card have
REAL = Path(__file__).parents[3] / "benchmarks" / "data" / "h100-convolutions.csv"
# Convolutions for which cuDNN 9.10 and 9.26 take the plan of 9.19, the release of that H100.
FROM_THE_CARD = (
    ("16x128x112x112", "128x128x3x3", "1x1", "float32", "filter"),
    ("16x128x56x56", "128x128x3x3", "2x2", "float32", "filter"),
    ("16x256x56x56", "256x256x3x3", "1x1", "bfloat16", "filter"),
    ("16x512x28x28", "512x512x3x3", "1x1", "float32", "data"),
    ("16x256x28x28", "512x256x3x3", "1x1", "bfloat16", "data"),
    ("16x512x14x14", "512x512x3x3", "1x1", "float32", "forward"),
    ("32x128x28x28", "256x128x3x3", "2x2", "float32", "forward"),
)


def _convolution(
    kernel: ConvolutionKernel,
    dtype: str,
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: int = 1,
) -> Convolution:
    padding = weight_shape[2] // 2
    height, width = (
        (length + 2 * padding - weight_shape[2]) // stride + 1 for length in input_shape[2:]
    )
    return Convolution(
        kernel=kernel,
        dtype=dtype,
        is_channels_last=False,
        input_shape=input_shape,
        weight_shape=weight_shape,
        output_shape=(input_shape[0], weight_shape[0], height, width),
        padding=(padding, padding),
        stride=(stride, stride),
        dilation=(1, 1),
    )


CASES = [
    _convolution(kernel, dtype, images, weight, stride)
    for kernel in ConvolutionKernel
    for dtype in ("float32", "bfloat16")
    for images, weight, stride in (
        ((16, 64, 56, 56), (64, 64, 3, 3), 1),
        ((32, 512, 14, 14), (512, 512, 3, 3), 2),
        ((4, 512, 7, 7), (512, 512, 3, 3), 1),
        ((16, 72, 56, 56), (72, 24, 3, 3), 1),
    )
]


@pytest.fixture
def cudnn() -> Iterator[Descriptors]:
    with Descriptors(load_cudnn()) as made:
        yield made


@pytest.mark.needs("nvidia.cudnn")
def test_the_rule_gives_what_cudnn_states_for_each_number_of_multiprocessors(
    cudnn: Descriptors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A described card has up to 18. On these the rule must agree to the byte."""
    card = cudnn.card(CudnnPlans(HOPPER, PlanSettings(), H100_MULTIPROCESSORS).properties)
    monkeypatch.setattr(splits, "most_clusters", lambda size, number: number // size)
    compared = changed = 0
    for case in CASES:
        graph = graph_of(cudnn, case)
        for config in cudnn.configs(cudnn.heuristics(graph, card, 3), 4):
            plan = PlanOfCard(cudnn=cudnn, graph=graph, config=config, card=card)
            kernel = splits._Kernel.of(plan)
            stated = None if kernel is None else cudnn.workspace_bytes(config, card)
            if kernel is None or stated is None:
                continue
            for number in DESCRIBED:
                try:
                    expected = kernel.bytes_on(plan, graph, number)
                except CudnnError:
                    assert number < kernel.size
                    continue
                assert whole_card_bytes(plan, case, stated, number) == expected
                compared += 1
                changed += expected != stated
    assert compared > 500
    assert changed > compared / 4


@pytest.mark.needs("nvidia.cudnn")
@pytest.mark.parametrize("row", FROM_THE_CARD, ids=" ".join)
def test_a_real_h100_takes_what_is_worked_out_for_it(row: tuple[str, ...]) -> None:
    """The figures were taken with cuDNN 9.19."""
    plans = CudnnPlans(HOPPER, PlanSettings(), H100_MULTIPROCESSORS)
    images, weight, stride, dtype, kernel = row
    case = _convolution(
        ConvolutionKernel(kernel), dtype, _sizes(images), _sizes(weight), _sizes(stride)[0]
    )
    described = CudnnPlans(HOPPER, PlanSettings()).workspace_bytes(case)
    taken = _taken_by_the_card()[images, weight, stride, dtype, kernel]
    assert plans.workspace_bytes(case) == taken
    assert described != taken


def test_clusters_of_a_card_are_those_that_an_h100_ran() -> None:
    ran = {1: 132, 2: 66, 4: 30, 5: 22, 8: 15, 16: 7}
    assert {size: most_clusters(size, H100_MULTIPROCESSORS) for size in ran} == ran
    assert 39 <= most_clusters(3, H100_MULTIPROCESSORS) <= 41
    assert most_clusters(4, 114) < most_clusters(4, H100_MULTIPROCESSORS)
    assert most_clusters(16, 4) == 1


def _taken_by_the_card() -> dict[tuple[str, ...], int]:
    with REAL.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return {
        (row["input"], row["weight"], row["stride"], row["dtype"], kernel.value): int(
            row[kernel.value]
        )
        for row in rows
        for kernel in ConvolutionKernel
    }


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))
