"""The lower-level form: a plan splits and weighs, the loop does the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from accumulation.parts import plan_of
from memfit import micro_batches
from memfit.errors import UsageError, WorkloadError


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 9))
def test_a_loop_over_the_split_has_the_full_batchs_gradient(
    effective: int, num_samples: int, micro: int
) -> None:
    """This holds for the effective batch, a short last batch, and a larger one."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(num_samples, 4).double(), torch.randint(3, (num_samples,))
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    parts = micro_batches(plan_of(effective, micro), (x, y))
    for part in parts:
        inputs, targets = part.batch
        assert len(inputs) == part.num_samples <= micro
        (F.cross_entropy(model(inputs), targets) * part.weight).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert float((parameter.grad - gradient).norm()) <= 1e-10 * float(gradient.norm())
    assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert sum(part.weight for part in parts) == pytest.approx(1)


def test_the_effective_batch_is_cut_as_planned() -> None:
    """The parts are the plan's own, in its multiples."""
    plan = plan_of(100, 60, multiple_of=8)
    assert [part.num_samples for part in micro_batches(plan, torch.zeros(100, 2))] == [56, 44]
    assert plan.micro_batch_sizes == (56, 44)


def test_weights_are_the_shares_of_what_is_counted() -> None:
    """A function counts tokens; a sum is not weighted."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    parts = micro_batches(plan_of(3, 1), {"mask": mask}, weight=lambda batch: batch["mask"].sum())
    assert [part.weight for part in parts] == pytest.approx([3 / 6, 1 / 6, 2 / 6])
    assert [part.weight for part in micro_batches(plan_of(3, 2), mask, weight="sum")] == [1, 1]


def test_counts_of_any_kind_weigh() -> None:
    """Counts may be NumPy's numbers, or tensors of one number."""
    x = torch.arange(6)
    for count in (lambda b: b.numpy().sum(), lambda b: b.sum(), lambda b: float(b.sum())):
        parts = micro_batches(plan_of(6, 3), x, weight=count)
        assert [part.weight for part in parts] == pytest.approx([3 / 15, 12 / 15])


def test_micro_batches_are_views() -> None:
    """Nothing is copied."""
    x = torch.zeros(6, 2)
    for part in micro_batches(plan_of(6, 2), x):
        assert part.batch.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_shares_of_ranks_sum_to_the_effective_batch() -> None:
    """If the ranks cannot share equally, the first ones take one sample more."""
    plan = plan_of(10, 2, world_size=4)
    assert [plan.share_of(rank) for rank in range(4)] == [3, 3, 2, 2]
    assert not plan.is_even
    assert plan_of(8, 2, world_size=2).is_even


@pytest.mark.parametrize(
    ("error", "batch", "options", "says"),
    [
        (WorkloadError, torch.tensor(1.0), {}, "no tensor with a leading dimension"),
        (WorkloadError, (torch.zeros(2), torch.zeros(3)), {}, "leading dimensions differ"),
        (UsageError, torch.zeros(2), {"weight": "tokens"}, "not 'tokens'"),
        (WorkloadError, torch.zeros(2), {"weight": lambda batch: 0}, "nothing to average over"),
    ],
)
def test_what_cannot_be_split_gets_a_sentence(
    error: type[Exception], batch: Any, options: dict[str, Any], says: str
) -> None:
    """The message is that of a step."""
    with pytest.raises(error, match=says):
        micro_batches(plan_of(4, 2), batch, **options)


def test_a_number_is_no_plan() -> None:
    """An Accumulator takes one, and the message says so."""
    number: Any = 4
    with pytest.raises(UsageError, match=r"takes the Plan that memfit[.]plan returns, not 4"):
        micro_batches(number, torch.zeros(8, 2))


def test_a_plan_for_several_ranks_wants_those_ranks() -> None:
    """One process alone would silently train on a part of the effective batch."""
    with pytest.raises(UsageError, match=r"for 4 ranks, and there is 1: plan with world_size=1"):
        micro_batches(plan_of(8, 2, world_size=4), torch.zeros(2))
