"""The blocks that are chosen to be recomputed are the cheapest for which the step fits."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.simulation.recomputation import Block, Moment, Recomputable

_SMALL = st.integers(0, 20)


@st.composite
def steps(draw: st.DrawFn) -> Recomputable:
    """Return a step of a few blocks and moments."""
    count = draw(st.integers(1, 6))
    blocks = tuple(
        Block(
            name=f"block {index}",
            flops=draw(_SMALL),
            parked_bytes=draw(_SMALL),
            recomputed_bytes=draw(st.integers(0, 60)),
        )
        for index in range(count)
    )
    moments = draw(
        st.lists(
            st.builds(Moment, held_bytes=st.integers(0, 80), num_parked=st.integers(0, count)),
            min_size=1,
            max_size=8,
        )
    )
    return Recomputable(blocks=blocks, moments=tuple(moments), total_flops=200)


@given(steps(), st.integers(0, 80))
def test_no_other_choice_fits_and_costs_less(step: Recomputable, limit: int) -> None:
    """All choices are tried one by one, and the best of them costs as much."""
    names = [block.name for block in step.blocks]
    fitting = [
        chosen
        for size in range(len(names) + 1)
        for chosen in itertools.combinations(names, size)
        if step.peak_of(chosen) <= limit
    ]
    found = step.cheapest(limit)
    if found is None:
        assert not fitting
        return
    assert step.peak_of(found) <= limit
    assert step.share_of(found) == min(map(step.share_of, fitting))


def test_many_different_blocks_are_chosen_from_quickly() -> None:
    """The number of choices that are followed is bounded, and the result is still good."""
    count = 200
    blocks = tuple(
        Block(
            name=str(index),
            flops=1000 + (index * 7919) % 997,
            parked_bytes=10_000 + (index * 104_729) % 9973,
            recomputed_bytes=0,
        )
        for index in range(count)
    )
    total = sum(block.parked_bytes for block in blocks)
    moments = (Moment(held_bytes=total, num_parked=count),)
    step = Recomputable(blocks=blocks, moments=moments, total_flops=1)
    found = step.cheapest(total // 2)
    assert found is not None
    assert step.peak_of(found) <= total // 2
    # What a relaxed choice costs, with one block taken in part, bounds every choice from below.
    rates = sorted(blocks, key=lambda block: block.flops / block.parked_bytes)
    freed = cost = 0.0
    for block in rates:
        part = min(1.0, (total - total // 2 - freed) / block.parked_bytes)
        freed, cost = freed + part * block.parked_bytes, cost + part * block.flops
    assert step.share_of(found) == pytest.approx(cost, rel=0.01)
