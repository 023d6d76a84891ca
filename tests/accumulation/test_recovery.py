"""A step that runs out of memory is done again, and the result does not show it."""

from __future__ import annotations

import copy
import logging
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from accumulation.parts import Failing, GradientRecorder, Restless, out_of_memory
from memfit import Accumulator
from memfit.accumulation import recovery
from memfit.accumulation.recovery import RetryMonitor, smaller
from memfit.errors import DoesNotFitError
from memfit.memory.release import release
from memfit.units import MIB


def seeded() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)


def trained(
    micro: int,
    loss: Callable[..., torch.Tensor],
    *,
    scaler: torch.amp.GradScaler | None = None,
    num_samples: int = 16,
) -> tuple[list[Any], Accumulator]:
    """Return everything that training for three steps leaves behind."""
    seeded()
    model = Restless()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen = GradientRecorder(optimizer)
    accumulator = Accumulator(model, optimizer, micro, loss=loss, scaler=scaler, clip_grad_norm=0.5)
    x, y = torch.randn(num_samples, 6), torch.randint(3, (num_samples,))
    losses = [accumulator.step((x, y)) for _ in range(3)]
    left = [
        *losses,
        *(copy.deepcopy(list(model.state_dict().values()))),
        *(value for state in optimizer.state.values() for value in state.values()),
        *(gradient for step in seen.steps for gradient in step),
        torch.get_rng_state(),
        torch.tensor(random.random()),  # noqa: S311 - a state to be put back
        torch.tensor(np.random.rand()),
        torch.tensor(model.num_calls),
        torch.tensor(0.0 if scaler is None else scaler.get_scale()),
    ]
    return left, accumulator


def same(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def never() -> Failing:
    return Failing(set(), out_of_memory, "forward")


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1), st.sampled_from(["forward", "backward"]), st.booleans())
def test_any_micro_batch_may_run_out(failing: int, where: str, has_scaler: bool) -> None:
    """The result is bit for bit that of a run with the smaller micro-batch from the start."""

    def scaler() -> torch.amp.GradScaler | None:
        return torch.amp.GradScaler("cpu", init_scale=64.0) if has_scaler else None

    failed, accumulator = trained(8, Failing({failing}, out_of_memory, where), scaler=scaler())
    assert accumulator.micro_batch_size == 4
    smaller_from_the_start, _ = trained(4, never(), scaler=scaler())
    assert same(failed, smaller_from_the_start)


@pytest.mark.parametrize("failing", range(8))
def test_a_later_step_may_run_out(failing: int) -> None:
    """Earlier steps keep their micro-batches; later steps have the smaller ones."""
    failed, accumulator = trained(4, Failing({failing}, out_of_memory, "backward"))

    seeded()
    model = Restless()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    losses = []
    for step in range(3):
        micro = 4 if step < failing // 4 else 2
        stepping = Accumulator(model, optimizer, micro, loss=F.cross_entropy, clip_grad_norm=0.5)
        losses.append(stepping.step((x, y)))
    reference = [*losses, *model.state_dict().values()]
    assert same(failed[: len(reference)], reference)
    assert accumulator.micro_batch_size == 2


def test_it_is_cut_until_it_fits() -> None:
    """The micro-batch runs out twice in a row here."""
    failed, accumulator = trained(16, Failing({0, 2}, out_of_memory, "backward"))
    reference, _ = trained(4, never())
    assert accumulator.micro_batch_size == 4
    assert same(failed, reference)


def test_the_new_size_is_kept_logged_once_and_put_back_when_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each change logs one line with the error's first line."""
    with caplog.at_level(logging.WARNING, logger="memfit"):
        _, accumulator = trained(16, Failing({0}, out_of_memory, "forward"))
    messages = [record.getMessage() for record in caplog.records]
    why = "CUDA out of memory. Tried to allocate 20.00 MiB"
    assert messages == [f"From now on, micro-batches of 16 samples are cut to 8: {why}"]
    assert accumulator.micro_batch_size == 8
    accumulator.restore_micro_batch_size()
    assert accumulator.micro_batch_size == 16


def test_a_suspected_failure_is_memory_if_a_smaller_batch_passes() -> None:
    """Libraries use the same words for other limits."""

    def suspected() -> Exception:
        return RuntimeError("could not create a primitive")

    failed, _ = trained(8, Failing({0}, suspected, "forward"))
    reference, _ = trained(4, never())
    assert same(failed, reference)


def restless_state(model: nn.Module) -> list[torch.Tensor]:
    return [*(v.clone() for v in model.state_dict().values()), torch.get_rng_state()]


@pytest.mark.parametrize("message", ["CUDA out of memory.", "could not create a primitive"])
def test_what_no_batch_is_small_enough_for_is_raised(message: str) -> None:
    """A memory error becomes a sentence; an error that may be another is raised unchanged."""
    seeded()
    model = Restless().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    failing = Failing(set(range(99)), lambda: RuntimeError(message), "forward")
    accumulator = Accumulator(model, optimizer, 4, loss=failing)
    before = restless_state(model)
    batch = (torch.randn(4, 6), torch.randint(3, (4,)))
    torch.set_rng_state(before[-1])
    expected = DoesNotFitError if "CUDA" in message else RuntimeError
    with pytest.raises(expected, match=message) as caught:
        accumulator.step(batch)
    assert type(caught.value) is expected
    assert same(before, restless_state(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert failing.num_calls == 3
    assert accumulator.micro_batch_size == 4


def test_without_recovery_the_error_comes_as_it_is() -> None:
    """The step is not tried again."""
    model = Restless()
    failing = Failing({0}, out_of_memory, "forward")
    accumulator = Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), 4, loss=failing, recover=False
    )
    with pytest.raises(torch.OutOfMemoryError):
        accumulator.step((torch.randn(4, 6), torch.randint(3, (4,))))
    assert failing.num_calls == 1


def test_a_failed_attempt_holds_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of the failed attempt is freed before the step is tried again."""
    alive: list[int] = []
    outputs_seen: list[Any] = []

    class Watched(Failing):
        def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            import weakref

            outputs_seen.append(weakref.ref(outputs))
            return super().__call__(outputs, targets)

    def released(device: torch.device) -> int:
        num_bytes = release(device)
        alive.append(sum(reference() is not None for reference in outputs_seen))
        return num_bytes

    monkeypatch.setattr("memfit.accumulation.accumulator.release", released)
    trained(16, Watched({0}, out_of_memory, "forward"))
    assert alive == [0]


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_smaller_is_about_half_and_a_multiple_where_it_can_be(size: int, unit: int) -> None:
    """One sample cannot be cut smaller."""
    less = smaller(size, multiple_of=unit)
    if size == 1:
        assert less is None
        return
    assert less is not None
    assert 1 <= less <= size // 2
    assert less > size // 2 - unit
    assert less % unit == 0 or size // 2 < unit


def test_retries_in_several_steps_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps in a row count; then the count restarts. A device without retries has none."""
    counts = iter([0, 1, 2, 2, 3, 4, 6, 7, 8, 9])
    monkeypatch.setattr(RetryMonitor, "_now", lambda self: next(counts))
    pressure = RetryMonitor(torch.device("cpu"))
    assert [pressure.is_repeated() for _ in range(9)] == [
        *(False, False, False),  # two with retries, one without
        *(False, False, True),
        *(False, False, True),
    ]
    monkeypatch.undo()
    assert not any(RetryMonitor(torch.device("cpu")).is_repeated() for _ in range(5))


def test_repeated_retries_shrink_the_micro_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The size shrinks from the next step on; the step itself is kept."""
    monkeypatch.setattr(recovery.RetryMonitor, "is_repeated", lambda self: True)
    with caplog.at_level(logging.WARNING, logger="memfit"):
        _, accumulator = trained(16, never())
    assert accumulator.micro_batch_size == 2
    assert "16 samples are cut to 8: allocator retries" in caplog.records[0].getMessage()


UNDER_A_REAL_LIMIT = """
import sys

import torch
from torch import nn

from memfit import Accumulator
from memfit.backends.cpu.limits import Footprint, limit_data
from memfit.backends.cpu.glibc_heap import steady_heap

MIB = 2**20
torch.set_num_threads(1)
steady_heap()


class Wide(nn.Module):
    '''Takes 3 MiB for each sample that is marked.'''

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1))

    def forward(self, x):
        ballast = torch.zeros(1 + int(x[:, 0].sum()) * 3 * MIB // 4)
        return self.body(x).squeeze(1) + ballast[0]


def train(micro, marked, limit_bytes):
    torch.manual_seed(0)
    model = Wide()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x, y = torch.randn(64, 4), torch.randn(64)
    x[:, 0] = 0
    x[16 * marked : 16 * marked + 16, 0] = 1
    accumulator = Accumulator(model, optimizer, micro, loss=nn.functional.mse_loss)
    if limit_bytes is not None:
        limit_data(Footprint.now().data_bytes + limit_bytes)
    losses = [accumulator.step((x, y)) for _ in range(2)]
    limit_data(None)
    return accumulator.micro_batch_size, [*losses, *model.state_dict().values()]


train(8, 0, None)  # libraries are loaded, and have their workspaces
for marked in range(4):
    _, reference = train(8, marked, None)
    size, limited = train(16, marked, 40 * MIB)
    assert size == 8, size
    assert all(torch.equal(a, b) for a, b in zip(reference, limited, strict=True)), marked
    assert all(value.isfinite().all() for value in limited)
    print("survived at micro-batch", marked)
"""


def test_a_real_limit_is_survived_at_any_micro_batch() -> None:
    """RLIMIT_DATA in a child makes real allocations fail; the result is the same bit for bit."""
    done = subprocess.run(
        [sys.executable, "-c", UNDER_A_REAL_LIMIT],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("survived") == 4
    assert done.stderr.count("DefaultCPUAllocator: can't allocate memory") == 4


class Ballast(nn.Module):
    """Takes 3 MiB for each sample that is marked, on the device of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return numbers of shape (samples, 1)."""
        ballast = torch.zeros(1 + int(x[:, 0].sum()) * 3 * MIB // 4, device=x.device)
        out: torch.Tensor = self.body(x) + ballast[0]
        return out


@pytest.mark.gpu
@pytest.mark.computes
def test_a_gpu_that_runs_out_is_survived() -> None:
    """Under a cap on the allocator, parameters, buffers and draws end the same bit for bit."""
    total_bytes = torch.cuda.get_device_properties(0).total_memory

    def train(micro: int, *, is_capped: bool) -> tuple[int, list[torch.Tensor]]:
        torch.manual_seed(0)
        model = Ballast().cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        x, y = torch.randn(64, 4), torch.randn(64, 1)
        x[:, 0] = 0
        x[16:32, 0] = 1
        accumulator = Accumulator(model, optimizer, micro, loss=F.mse_loss)
        torch.cuda.empty_cache()
        room_bytes = torch.cuda.memory_reserved() + 40 * MIB
        torch.cuda.set_per_process_memory_fraction(room_bytes / total_bytes if is_capped else 1.0)
        try:
            losses = [accumulator.step((x, y)) for _ in range(2)]
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return accumulator.micro_batch_size, [*losses, *model.state_dict().values()]

    train(8, is_capped=False)  # libraries are loaded, and have their workspaces
    _, reference = train(8, is_capped=False)
    size, limited = train(16, is_capped=True)
    assert size == 8
    assert same(limited, reference)
