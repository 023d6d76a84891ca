"""Needs whose bytes grow evenly are found once for all batch sizes."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from memfit.cards import Gpu, find_gpu
from memfit.records import Action
from memfit.simulation.cudnn.needs import workspace_need
from memfit.simulation.cudnn.questions import Convolution, ConvolutionKernel
from memfit.simulation.needs import Need, NeedEvent
from memfit.simulation.program import CardSizes, NeedNumbers, Program

GPU = find_gpu("rtx3090")
RECORDED = 2


def program(need: Need, growth: tuple[float, ...]) -> Program:
    event = NeedEvent(
        action=Action.ALLOC, id=1, num_bytes=0, origin="test", need=need, growth=growth
    )
    return Program([event], [0], RECORDED)


@given(
    kernel=st.sampled_from(ConvolutionKernel),
    dtype=st.sampled_from(("float32", "bfloat16")),
    is_last=st.booleans(),
    channels=st.integers(1, 300),
    pixels=st.integers(1, 30),
    filter_size=st.sampled_from((1, 3)),
    bound=st.sampled_from((0, 2, 4)),
    batch_sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=4),
)
def test_a_bound_is_the_same_as_a_line(  # noqa: PLR0917 - drawn
    kernel: ConvolutionKernel,
    dtype: str,
    is_last: bool,
    channels: int,
    pixels: int,
    filter_size: int,
    bound: int,
    batch_sizes: list[int],
) -> None:
    """What a quick sweep adds up from a line is what the rule says at that batch size."""
    shape = (RECORDED, channels, pixels, pixels)
    padding = filter_size // 2
    convolution = Convolution(
        kernel=kernel,
        dtype=dtype,
        is_channels_last=is_last,
        input_shape=shape,
        weight_shape=(channels, channels, filter_size, filter_size),
        output_shape=shape,
        padding=(padding, padding),
        stride=(1, 1),
        dilation=(1, 1),
    )
    need = workspace_need(convolution, bound_bytes_per_element=bound, is_quick=True)
    growth = tuple(1.0 if at in {0, 8} else 0.0 for at in range(len(need.numbers)))
    made = program(need, growth)
    sizes = CardSizes(GPU, NeedNumbers())
    for batch_size in batch_sizes:
        event = made.different_needs[0]
        assert sizes.of(made, batch_size) == [event.bytes_after(batch_size - RECORDED, GPU)]


def _squared(_: Gpu, side: int) -> int:
    return side**2


def test_what_does_not_grow_evenly_is_no_line() -> None:
    """A promise that a rule does not keep is not relied on."""
    need = Need(rule=_squared, numbers=(RECORDED,), is_even=True)
    assert CardSizes(GPU, NeedNumbers()).of(program(need, (1.0,)), 10) == [100]
    plain = dataclasses.replace(need, is_even=False)
    assert CardSizes(GPU, NeedNumbers()).of(program(plain, (1.0,)), 10) == [100]


def test_cards_share_the_numbers_of_needs_and_not_their_sizes() -> None:
    """The same need has one number, and each card its own bytes for it."""
    need = Need(rule=lambda gpu, side: side * gpu.multiprocessors, numbers=(RECORDED,))
    made, numbers = program(need, (1.0,)), NeedNumbers()
    for name in ("rtx3090", "t4"):
        gpu = find_gpu(name)
        assert CardSizes(gpu, numbers).of(made, 7) == [7 * gpu.multiprocessors]
