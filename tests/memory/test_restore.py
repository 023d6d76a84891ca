"""A user's objects are put back bit for bit."""

from __future__ import annotations

import copy
import os
import random
import signal
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from memfit import Workload
from memfit.errors import WorkloadError
from memfit.memory.release import release
from memfit.memory.restore import preserved
from memfit.records import Precision, StepOptions
from memfit.step.training_step import TrainingStep

CPU = torch.device("cpu")


def everything(workload: Workload) -> dict[str, Any]:
    """Return a deep copy of all that a step can change, with the tensors' identities."""
    model, optimizer = workload.model, workload.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return copy.deepcopy(
        {
            "identity": [id(t) for t in (*model.parameters(), *model.buffers())],
            "state": model.state_dict(),
            "strides": [p.stride() for p in model.parameters()],
            "dtypes": [p.dtype for p in model.parameters()],
            "gradients": [p.grad for p in model.parameters()],
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "training": [m.training for m in model.modules()],
            "calls": model.num_calls,
            "optimizer": optimizer.state_dict(),
            "random": (random.getstate(), torch.get_rng_state()),
            "numpy": np.random.get_state(legacy=False),
            "switches": (
                torch.backends.cudnn.benchmark,
                torch.are_deterministic_algorithms_enabled(),
                torch.is_grad_enabled(),
                torch.get_default_dtype(),
            ),
        }
    )


def same(left: Any, right: Any) -> bool:
    """Return whether two nestings are equal, with tensors compared bit for bit."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray):
        return bool((left == right).all())
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def wreck(workload: Workload, options: StepOptions) -> None:
    """Change the user's objects as trials do, and more."""
    step = TrainingStep(subject=workload, options=options)
    prepared = step.prepare(CPU)
    prepared.begin()
    prepared.iterate(6)
    prepared.iterate(3)
    workload.model.eval()
    next(workload.model.parameters()).requires_grad_(False)
    assert isinstance(workload.optimizer, torch.optim.Optimizer)
    workload.optimizer.param_groups[0]["lr"] = 7.0
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    random.random()  # noqa: S311 - to move the state
    np.random.rand()


OPTIONS = [
    StepOptions(precision=Precision.FP32),
    StepOptions(precision=Precision.AMP_BF16, accumulate=True),
    StepOptions(precision=Precision.BF16, channels_last=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options.precision.value)
@pytest.mark.parametrize("ending", [None, RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_everything_is_put_back_however_it_ends(
    workload: Workload, options: StepOptions, ending: type[BaseException] | None
) -> None:
    """Nothing differs by a bit after success, an error, Ctrl-C and an out-of-memory."""
    next(workload.model.parameters()).grad = None
    before = everything(workload)
    optimizer = workload.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    if options.precision is Precision.BF16:
        # An optimizer that has fp32 state cannot go on with bf16 weights.
        optimizer.state.clear()
        before = everything(workload)
    raised: BaseException | None = None
    try:
        with preserved(workload.model, optimizer=optimizer) as kept:
            wreck(workload, options)
            kept.release_replaced()
            if ending is not None:
                raise ending
    except (RuntimeError, KeyboardInterrupt) as error:
        raised = error
    assert type(raised) is (type(None) if ending is None else ending)
    assert same(before, everything(workload))


def test_the_check_above_can_fail(workload: Workload) -> None:
    """Without putting back, the same steps change everything, and the check sees it."""
    before = everything(workload)
    restore = torch.get_default_dtype()
    wreck(workload, OPTIONS[0])
    torch.set_default_dtype(restore)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = before["switches"][0]
    after = everything(workload)
    changed = {key for key in before if not same(before[key], after[key])}
    assert {"state", "optimizer", "gradients", "training", "calls", "random", "numpy"} <= changed


def test_an_empty_optimizer_is_empty_again() -> None:
    """State that the trials created is removed."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    with preserved(model, optimizer=optimizer):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert optimizer.state == {}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_buffer_that_was_replaced_is_the_same_tensor_again() -> None:
    """If code assigns a new buffer, the old one comes back."""
    model = nn.BatchNorm1d(2)
    buffer = model.running_mean
    with preserved(model):
        model.running_mean = torch.full((2,), 9.0)
    assert model.running_mean is buffer
    assert torch.equal(model.running_mean, torch.zeros(2))


def test_an_interrupt_while_putting_back_waits_until_it_is_done() -> None:
    """Ctrl-C at a bad moment never leaves objects half restored."""
    model = nn.Linear(3, 2)
    weight = model.weight.detach().clone()

    class Interrupting(torch.optim.SGD):
        """Sends Ctrl-C while its groups are being put back."""

        @property
        def param_groups(self) -> Any:
            if armed:
                armed.clear()
                os.kill(os.getpid(), signal.SIGINT)
            return self._groups

        @param_groups.setter
        def param_groups(self, groups: Any) -> None:
            self._groups = groups

    armed: list[bool] = []
    optimizer = Interrupting(model.parameters(), lr=0.1)
    with pytest.raises(KeyboardInterrupt), preserved(model, optimizer=optimizer):
        with torch.no_grad():
            model.weight.zero_()
        armed.append(True)
    assert not armed
    assert torch.equal(model.weight, weight)


def test_lazy_modules_are_refused() -> None:
    """They have no values yet that could be put back."""
    with (
        pytest.raises(WorkloadError, match="Run one batch through the model first"),
        preserved(nn.LazyLinear(3)),
    ):
        pytest.fail("entered")


def test_releasing_the_cpu_leaves_nothing_to_count() -> None:
    """A CPU does not count the bytes of tensors; only dead cycles are collected."""
    cycle: list[Any] = [torch.ones(10)]
    cycle.append(cycle)
    del cycle
    assert release(CPU) == 0
