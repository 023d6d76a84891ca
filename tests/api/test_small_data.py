"""A data set that is smaller than the search: the answer says how far it is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import memfit
from memfit.errors import DataEndedError

DATA = TensorDataset(torch.randn(40, 3, 8, 8), torch.randint(4, (40,)))


def loaded(batch_size: int) -> Any:
    """Return a batch of a loader, whose last batch may be short."""
    return next(iter(DataLoader(DATA, batch_size=batch_size)))


def whole_only(batch_size: int) -> Any:
    """Return a batch of a loader that drops a short last batch."""
    return next(iter(DataLoader(DATA, batch_size=batch_size, drop_last=True)))


def workload(batch: Callable[[int], Any]) -> memfit.Workload:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    return memfit.Workload(model, batch, nn.functional.cross_entropy, "sgd")


@pytest.mark.parametrize(
    "where", [{"device": "cpu", "memory": "300MiB"}, {"gpu": "rtx3090"}], ids=["cpu", "simulated"]
)
def test_the_search_ends_where_the_data_does(where: dict[str, Any]) -> None:
    """This holds measured and simulated; the user's random states do not change."""
    small = workload(loaded)
    state = torch.get_rng_state()
    result = memfit.probe(small, **where)
    assert torch.equal(torch.get_rng_state(), state)
    assert (result.max_batch_size, result.proved) == (40, False)
    assert result.recommended_batch_size == 40
    (remark,) = result.remarks
    assert remark.startswith("The data ends at 40 samples, so larger batches were not tried. If ")
    assert remark.endswith("max_batch_size=40. If not, give a function that repeats the samples.")
    sizes = [trial.batch_size for trial in result.trials]
    assert len(sizes) == len(set(sizes))


def test_a_loader_that_drops_the_last_batch_ends_it_too() -> None:
    """The search ends at the largest batch that the loader had."""
    result = memfit.probe(workload(whole_only), device="cpu", memory="300MiB")
    assert 1 <= result.max_batch_size <= 40
    assert "The data ends at" in result.remarks[0]


def test_a_search_that_ends_before_says_nothing() -> None:
    """The ceiling came from the user."""
    result = memfit.probe(workload(loaded), device="cpu", memory="300MiB", max_batch_size=8)
    assert (result.max_batch_size, result.remarks) == (8, ())


def test_a_plan_for_more_than_there_is_names_the_way_out() -> None:
    """The data must have as many samples as the effective batch."""
    says = r"returned 40 samples when asked for 64. .* give max_batch_size=40"
    with pytest.raises(DataEndedError, match=says):
        memfit.plan(workload(loaded), 64, device="cpu", memory="300MiB")
    plan = memfit.plan(workload(loaded), 64, device="cpu", memory="300MiB", max_batch_size=40)
    assert plan.micro_batch_sizes == (32, 32)
