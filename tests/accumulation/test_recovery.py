"""A step that runs out of memory is done again, as if it had not."""

from __future__ import annotations

import copy
import logging
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from accumulation.gradients import GradientRecorder
from memfit import Accumulator
from memfit.accumulation import recovery
from memfit.accumulation.recovery import Pressure, smaller
from memfit.errors import DoesNotFitError


class Restless(nn.Module):
    """Changes everything that a forward pass can: buffers, attributes and all random states."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(8, 3)
        self.num_calls = 0
        self.register_buffer("queue", torch.zeros(4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, 3)."""
        hidden = self.dropout(self.norm(self.first(x)))
        self.num_calls += 1
        # One buffer is written to, and another takes its place.
        self.queue = torch.cat([self.queue[1:], hidden.detach().mean(0, keepdim=True)])
        noise = random.random() + float(np.random.rand())  # noqa: S311 - a state to be put back
        scores: torch.Tensor = self.last(hidden) * (1 + noise)
        return scores


class Failing:
    """A loss that runs out of memory in chosen calls, in forward or in backward."""

    def __init__(self, calls: set[int], make_error: Callable[[], Exception], where: str) -> None:
        self.calls = calls
        self.make_error = make_error
        self.where = where
        self.num_calls = 0

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        is_failing = self.num_calls in self.calls
        self.num_calls += 1
        if is_failing and self.where == "forward":
            raise self.make_error()
        if is_failing:
            outputs.register_hook(self._fail)
        return F.cross_entropy(outputs, targets)

    def _fail(self, _gradient: torch.Tensor) -> None:
        raise self.make_error()


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


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
    accumulator = Accumulator(
        model, optimizer, micro, loss=loss, scaler=scaler, clip_grad_norm=0.5
    )
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
    """Bit for bit what a run with the smaller micro-batch from the start leaves: all of it."""

    def scaler() -> torch.amp.GradScaler | None:
        return torch.amp.GradScaler("cpu", init_scale=64.0) if has_scaler else None

    failed, accumulator = trained(8, Failing({failing}, out_of_memory, where), scaler=scaler())
    assert accumulator.micro_batch_size == 4
    smaller_from_the_start, _ = trained(4, never(), scaler=scaler())
    assert same(failed, smaller_from_the_start)


@pytest.mark.parametrize("failing", range(8))
def test_a_later_step_may_run_out(failing: int) -> None:
    """Steps before it keep their micro-batches; those after it have the smaller ones."""
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
    """Twice in a row."""
    failed, accumulator = trained(16, Failing({0, 2}, out_of_memory, "backward"))
    reference, _ = trained(4, never())
    assert accumulator.micro_batch_size == 4
    assert same(failed, reference)


def test_the_new_size_is_kept_logged_once_and_put_back_when_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line for each change, with the error's first line."""
    with caplog.at_level(logging.WARNING, logger="memfit"):
        _, accumulator = trained(16, Failing({0}, out_of_memory, "forward"))
    assert [record.getMessage() for record in caplog.records] == [
        "micro-batches of 16 are cut to 8 from here on: "
        "CUDA out of memory. Tried to allocate 20.00 MiB"
    ]
    assert accumulator.micro_batch_size == 8
    accumulator.restore_micro_batch_size()
    assert accumulator.micro_batch_size == 16


def test_a_suspected_failure_is_memory_if_a_smaller_batch_passes() -> None:
    """What libraries also say for limits of their own."""

    def suspected() -> Exception:
        return RuntimeError("could not create a primitive")

    failed, _ = trained(8, Failing({0}, suspected, "forward"))
    reference, _ = trained(4, never())
    assert same(failed, reference)


def restless_state(model: nn.Module) -> list[torch.Tensor]:
    return [*(v.clone() for v in model.state_dict().values()), torch.get_rng_state()]


@pytest.mark.parametrize("message", ["CUDA out of memory. ", "could not create a primitive"])
def test_what_no_batch_is_small_enough_for_is_raised(message: str) -> None:
    """A sentence for memory, the error as it came for what was only suspected."""
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


def test_without_recovery_the_error_comes_as_it_is() -> None:
    """Nothing is tried again."""
    model = Restless()
    failing = Failing({0}, out_of_memory, "forward")
    accumulator = Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), 4, loss=failing, recover=False
    )
    with pytest.raises(torch.OutOfMemoryError):
        accumulator.step((torch.randn(4, 6), torch.randint(3, (4,))))
    assert failing.num_calls == 1


def test_a_failed_attempt_holds_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of what ran out is gone before anything is tried again."""
    alive: list[int] = []
    outputs_seen: list[Any] = []

    class Watched(Failing):
        def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            import weakref

            outputs_seen.append(weakref.ref(outputs))
            return super().__call__(outputs, targets)

    def release(_device: torch.device) -> int:
        alive.append(sum(reference() is not None for reference in outputs_seen))
        return 0

    monkeypatch.setattr("memfit.cleanup.release", release)
    trained(16, Watched({0}, out_of_memory, "forward"))
    assert alive == [0]


@given(st.integers(1, 10_000), st.integers(1, 64))
def test_smaller_is_about_half_and_a_multiple_where_it_can_be(size: int, unit: int) -> None:
    """And ends after one."""
    less = smaller(size, multiple_of=unit)
    if size == 1:
        assert less is None
        return
    assert less is not None
    assert 1 <= less <= size // 2
    assert less > size // 2 - unit
    assert less % unit == 0 or size // 2 < unit


def test_retries_in_several_steps_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """In three in a row, counted anew afterwards; never on a device that has none."""
    counts = iter([0, 1, 2, 2, 3, 4, 6, 7, 8, 9])
    monkeypatch.setattr(Pressure, "_now", lambda self: next(counts))
    pressure = Pressure(torch.device("cpu"))
    assert [pressure.is_repeated() for _ in range(9)] == [
        *(False, False, False),  # two with retries, one without
        *(False, False, True),
        *(False, False, True),
    ]
    monkeypatch.undo()
    assert not any(Pressure(torch.device("cpu")).is_repeated() for _ in range(5))


def test_repeated_retries_shrink_the_micro_batch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the next step on; the step itself is good."""
    monkeypatch.setattr(recovery.Pressure, "is_repeated", lambda self: True)
    with caplog.at_level(logging.WARNING, logger="memfit"):
        _, accumulator = trained(16, never())
    assert accumulator.micro_batch_size == 2
    assert "16 are cut to 8 from here on: allocator retries" in caplog.records[0].getMessage()


def test_a_real_limit_is_survived() -> None:
    """RLIMIT_DATA in a child: real allocations fail, parameters end bit-identical."""
    script = """
        import logging, resource, sys
        import torch
        from torch import nn
        from memfit import Accumulator
        from memfit.backends.linux import Footprint, limit_data, steady_heap

        torch.set_num_threads(1)
        steady_heap()
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        MIB = 2**20


        class Wide(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(16)
                self.scale = nn.Parameter(torch.ones(16, 2**12))

            def forward(self, x):
                # Half a MiB in each of several activations, for each sample.
                wide = nn.functional.dropout(self.norm(x).unsqueeze(2) * self.scale, 0.5)
                return (wide.exp() * wide.sigmoid()).mean((1, 2))


        def train(micro, limit_bytes):
            torch.manual_seed(0)
            model = Wide()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            batch = (torch.randn(64, 16), torch.randn(64))
            accumulator = Accumulator(model, optimizer, micro, loss=nn.functional.mse_loss)
            accumulator.step(batch)  # libraries are loaded, and know their workspaces
            if limit_bytes is not None:
                limit_data(Footprint.now().data_bytes + limit_bytes)
            accumulator.restore_micro_batch_size()
            for _ in range(2):
                accumulator.step(batch)
            limit_data(None)
            return list(model.state_dict().values()), accumulator.micro_batch_size


        warm = int(sys.argv[1])
        if warm == 0:
            limited, size = train(64, 50 * MIB)
            torch.save((limited, size), sys.argv[2])
        else:
            torch.save(train(warm, None), sys.argv[2])
    """
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program.py")
        program.write_text(textwrap.dedent(script))

        def run(micro: int) -> tuple[list[torch.Tensor], int, str]:
            path = Path(folder, f"{micro}.pt")
            done = subprocess.run(
                [sys.executable, str(program), str(micro), str(path)],
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr
            values, size = torch.load(path)
            return values, size, done.stdout

        print(run(0))
