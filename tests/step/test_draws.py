# ruff: noqa: S311 - what is drawn is tested
"""Single numbers that a step draws on the host are seen and forced to both ends."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from memfit.step.draws import ENDS, Draws

LOW, HIGH = ENDS
SINGLE: dict[str, Callable[[], Any]] = {
    "random": lambda: 1 * random.random(),
    "uniform": lambda: random.uniform(0, 1),
    "numpy": lambda: 1 * np.random.rand(),
    "numpy uniform": lambda: np.random.uniform(0, 1),
    "torch": lambda: torch.rand(1).item(),
    "torch of no dimension": lambda: torch.rand([]).item(),
    "in place": lambda: torch.empty(1).uniform_().item(),
    "bernoulli": lambda: torch.bernoulli(torch.tensor(0.5)).item(),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_single_number_is_seen_and_forced(name: str) -> None:
    """One end is below any probability, and the other is above."""
    draw = SINGLE[name]
    seen = Draws()
    with seen.watched():
        draw()
    assert seen.num_seen == 1
    with Draws(LOW).watched():
        assert draw() < 0.001
    with Draws(HIGH).watched():
        assert draw() > 0.999


def test_choices_are_forced_to_the_first_and_the_last() -> None:
    """They choose sizes of images or numbers of layers."""
    draws = (
        lambda: random.choice([1, 2, 3]),
        lambda: random.randint(1, 3),
        lambda: random.randrange(1, 4),
        lambda: np.random.randint(1, 4),
        lambda: np.random.choice([1, 2, 3]),
        lambda: random.choice([2, 3, 1]),
        lambda: random.choices([2, 3, 1])[0],
        lambda: torch.randint(1, 4, ()).item(),
        lambda: torch.randint(low=1, high=4, size=(1,)).item(),
        lambda: torch.randint(3, (1,)).item() + 1,
    )
    for share, expected in ((LOW, 1), (HIGH, 3)):
        with Draws(share).watched():
            assert [draw() for draw in draws] == [expected] * len(draws)


def test_sizes_are_forced_to_the_smallest_and_the_largest() -> None:
    """Their order in a list says nothing; what is no size keeps its order."""
    sizes = [(32, 32), (64, 48), (48, 48)]
    for share, expected in ((LOW, ((32, 32), "b")), (HIGH, ((64, 48), "a"))):
        with Draws(share).watched():
            assert (random.choice(sizes), random.choice("bca")) == expected


def test_one_number_for_each_layer_is_forced() -> None:
    """A short vector on the host may choose layers."""
    seen = Draws()
    with seen.watched():
        torch.rand(12)
    assert seen.num_seen == 1
    with Draws(HIGH).watched():
        assert bool((torch.rand(12) > 0.999).all())
        assert torch.bernoulli(torch.full((12,), 0.5)).tolist() == [1.0] * 12


def test_many_numbers_are_left_alone() -> None:
    """Noise, dropout and masks do not decide which layers run."""
    draws = Draws(HIGH)
    with draws.watched():
        drawn = (torch.rand(3, 100), np.random.rand(100), np.random.uniform(0, 1, 100))
        torch.nn.functional.dropout(torch.ones(100), 0.5)
    assert draws.num_seen == 0
    assert all(float(values.min()) < 0.5 for values in drawn)


def test_everything_draws_as_before_afterwards() -> None:
    """This holds after an error too."""
    before = (random.random, random.choice, np.random.rand)
    with pytest.raises(RuntimeError, match="boom"), Draws(LOW).watched():
        raise RuntimeError("boom")
    assert (random.random, random.choice, np.random.rand) == before
