"""Rehearsed cards: the CUDA backend in a process whose device computes nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from typing import Any

import pytest
import torch
from integrations import zoo
from pinned import IS_PINNED
from torch import nn

import memfit
from memfit.api.asking import Asked
from memfit.api.cards import Cards
from memfit.backends.rehearsed.parcel import packed, unpacked
from memfit.cards import find_gpu
from memfit.errors import DoesNotFitError, StepCrashedError, UnsupportedError, UsageError
from memfit.records import Engine, Outcome, Source, StepOptions
from memfit.step.training_step import TrainingStep
from memfit.step.workload import Workload

pytestmark = pytest.mark.rehearses


class Perceptron(nn.Module):
    """A wide layer and a narrow one."""

    def __init__(self, width: int = 1024) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 8))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, 8) for inputs of shape (samples, 64)."""
        scores: torch.Tensor = self.layers(inputs)
        return scores


def perceptron(width: int = 1024, optimizer: Any = "adamw") -> Workload:
    """Return a workload with a loss that pickle cannot take."""
    batch = (torch.zeros(2, 64), torch.zeros(2, dtype=torch.long))
    return Workload(
        Perceptron(width), batch, lambda x, y: nn.functional.cross_entropy(x, y) * 2, optimizer
    )


def test_a_probe_is_rehearsed_with_its_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    """b fitted and b + 1 ran out in torch's own words; nothing is called measured or timed."""
    started: list[Any] = []
    popen = subprocess.Popen

    def counted(*arguments: Any, **keywords: Any) -> Any:
        started.append(arguments)
        return popen(*arguments, **keywords)

    monkeypatch.setattr(subprocess, "Popen", counted)
    workload = perceptron(8192)
    before = [parameter.clone() for parameter in workload.model.parameters()]
    found = memfit.survey(workload, gpus=("rtx3060", "rtx3090"), memory="900MiB", engine="rehearse")
    assert found.source is Source.REHEARSED
    assert len(started) == 1
    for answer in found.answers:
        result = answer.result
        assert result is not None
        assert result.proved
        assert result.source is Source.REHEARSED
        edge = result.max_batch_size
        beyond, at_edge = result.trial_at(edge + 1), result.trial_at(edge)
        assert beyond is not None
        assert at_edge is not None
        assert beyond.outcome is Outcome.OUT_OF_MEMORY
        assert "CUDA out of memory" in (beyond.message or "")
        assert at_edge.fits
        assert all(trial.step_seconds is None for trial in result.trials)
        assert result.recommended_batch_size is not None
        assert result.predictions
    assert all(torch.equal(*pair) for pair in zip(before, workload.model.parameters(), strict=True))


def test_an_estimate_and_a_plan_are_rehearsed() -> None:
    """Both use the same engine, also with a user's own optimizer."""
    model = Perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batch = (torch.zeros(2, 64), torch.zeros(2, dtype=torch.long))
    workload = Workload(model, batch, nn.functional.cross_entropy, optimizer)
    trial = memfit.estimate(workload, 4096, gpu="rtx3060", engine="rehearse", precision="fp32")
    assert trial.source is Source.REHEARSED
    # Weights, momentum and gradients, and the wide layer's output and its ReLU's.
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert trial.peak_requested_bytes is not None
    assert trial.peak_requested_bytes >= 3 * weights + 2 * 4096 * 1024 * 4
    assert not optimizer.state
    plan = memfit.plan(
        workload, 100_000, gpu="rtx3060", memory="900MiB", engine="rehearse", precision="fp32"
    )
    assert plan.source is Source.REHEARSED
    assert sum(plan.micro_batch_sizes) == 100_000
    assert plan.accumulation_steps > 1


def test_what_a_loss_holds_is_on_the_card() -> None:
    """Class weights in a module, in a closure, and beside an optimizer's own state."""
    model = Perceptron()
    weights = torch.ones(8)
    batch = (torch.zeros(2, 64), torch.zeros(2, dtype=torch.long))
    optimizer = torch.optim.Adam(model.parameters())
    model(batch[0]).sum().backward()
    optimizer.step()
    losses = (
        nn.CrossEntropyLoss(weight=weights),
        lambda x, y: nn.functional.cross_entropy(x, y, weight=weights),
    )
    for loss in losses:
        workload = Workload(model, batch, loss, optimizer)
        assert memfit.estimate(workload, 64, gpu="rtx3060", engine="rehearse").fits


def test_weights_that_do_not_fit_are_said_with_what_they_need() -> None:
    """The message has what the smallest batch takes and what the card has."""
    with pytest.raises(DoesNotFitError) as caught:
        memfit.probe(perceptron(4_000_000, "sgd"), gpu="rtx3060", memory="1GiB", engine="rehearse")
    assert re.search(r"needs \d+(\.\d+)? [GM]iB, and \d+ MiB are available", str(caught.value))
    assert caught.value.needed_bytes is not None
    assert caught.value.needed_bytes > 4_000_000 * 64 * 4


def test_a_profile_is_rehearsed(tmp_path: Any) -> None:
    """It comes from the allocator's history; shares add up and a snapshot can be written.

    The CUDA context is among them, as in a simulated profile, so both have the same total.
    """
    file = tmp_path / "history.pickle"
    profile = memfit.profile(
        perceptron(), 512, gpu="rtx3060", engine="rehearse", precision="fp32", snapshot=file
    )
    assert profile.source is Source.REHEARSED
    held = sum(share.num_bytes for share in profile.peak.roles)
    assert held == profile.peak.total_bytes
    assert profile.peak.bytes_of(memfit.Role.PARAMETERS) > 0
    assert profile.peak.context_bytes == find_gpu("rtx3060").context_bytes
    # What a sample brings comes from the simulation, where both hold the same bytes.
    simulated = memfit.profile(
        perceptron(), 512, gpu="rtx3060", engine="simulate", precision="fp32"
    )
    assert profile.bytes_per_sample == simulated.bytes_per_sample
    assert simulated.bytes_per_sample
    assert file.stat().st_size > 0


def test_a_users_own_error_is_raised_as_it_came() -> None:
    """It says where it happened in the other process."""
    workload = perceptron()
    broken = Workload(workload.model, workload.batch, _breaks, "adamw")
    with pytest.raises(KeyError, match="no such thing") as caught:
        memfit.estimate(broken, 2, gpu="rtx3060", engine="rehearse")
    assert "_breaks" in str(caught.value.__cause__)


def _breaks(_outputs: torch.Tensor, _targets: torch.Tensor) -> torch.Tensor:
    raise KeyError("no such thing")


def test_a_trial_does_not_depend_on_the_trials_before_it() -> None:
    """A script begins in a new process. Another order of frees in autocast decides at this edge."""
    workload = Workload(zoo.Net(), zoo.images(4).tensors, zoo.Fp32Loss(), "adamw")
    asked = Asked.of(workload, accumulate=True, precision="amp-fp16", memory="1GiB")
    found = memfit.probe(
        workload,
        gpu="a100-40gb",
        engine="rehearse",
        accumulate=True,
        precision="amp-fp16",
        memory="1GiB",
    )
    edge = found.max_batch_size
    assert edge == 284 or not IS_PINNED
    with Cards(Engine.REHEARSE) as cards:
        outcomes = {
            sizes: [
                (trial.batch_size, trial.outcome, trial.peak_reserved_bytes)
                for trial in trials_of(cards, asked, sizes)
            ]
            for sizes in ((edge,), (edge + 4,), (edge + 5, edge + 4, edge))
        }
    alone = [*outcomes[edge,], *outcomes[edge + 4,]]
    assert sorted(outcomes[edge + 5, edge + 4, edge][1:]) == alone
    assert [outcome for _, outcome, _ in alone] == [Outcome.FITS, Outcome.OUT_OF_MEMORY]


def trials_of(cards: Cards, asked: Asked, sizes: tuple[int, ...]) -> list[memfit.Trial]:
    with cards.open("a100-40gb", asked.memory_bytes, asked.step) as card:
        return [card.trial(asked.step, size) for size in sizes]


def test_a_process_that_is_killed_is_said() -> None:
    """A machine without memory left kills it. Nobody waits for its answer."""
    workload = perceptron()
    killed = Workload(workload.model, workload.batch, _kills, "adamw")
    before = signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(120)
    try:
        with pytest.raises(
            StepCrashedError, match=f"with code {128 + signal.SIGKILL}. Something killed"
        ):
            memfit.estimate(killed, 2, gpu="rtx3060", engine="rehearse")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _kills(_outputs: torch.Tensor, _targets: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _too_late(*_: object) -> None:
    raise TimeoutError("it still waits")


def test_what_cannot_be_rehearsed_is_said_in_a_sentence() -> None:
    """These are unknown engines, AMD's cards, and steps that cannot leave the process."""
    with pytest.raises(UsageError, match="no engine 'real'; choose one of auto, rehearse, sim"):
        memfit.estimate("test_vit", 2, gpu="rtx3060", engine="real")
    with pytest.raises(UsageError, match="Only NVIDIA's cards"):
        memfit.estimate("test_vit", 2, gpu="mi300x", engine="rehearse")
    held = perceptron()
    held.model.generator = (number for number in range(3))  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match=r'cannot be sent .* engine="simulate"'):
        memfit.estimate(held, 2, gpu="rtx3060", engine="rehearse")


def test_auto_simulates_what_it_cannot_rehearse(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are another vendor's cards, and a card of which only the size is known."""
    monkeypatch.setenv("MEMFIT_ENGINE", "auto")
    for gpu, memory in (("mi300x", None), ("any", "8GiB")):
        trial = memfit.estimate(perceptron(), 2, gpu=gpu, memory=memory)
        assert trial.source is Source.SIMULATED


def test_large_weights_travel_without_their_values() -> None:
    """Shapes, types and ties stay; the optimizer still holds the model's parameters."""
    model = Perceptron()
    model.layers[2].weight = nn.Parameter(torch.ones(8, 1024, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    workload = Workload(model, (torch.ones(2, 64),), lambda x: x.sum(), optimizer)
    step = TrainingStep(subject=workload, options=StepOptions())
    parcel = packed(step)
    assert len(parcel) < 200_000
    there = unpacked(parcel).subject
    assert isinstance(there, Workload)
    assert isinstance(there.optimizer, torch.optim.Optimizer)
    ours, theirs = list(model.parameters()), list(there.model.parameters())
    assert [(p.shape, p.dtype, p.stride()) for p in ours] == [
        (p.shape, p.dtype, p.stride()) for p in theirs
    ]
    held = [id(p) for group in there.optimizer.param_groups for p in group["params"]]
    assert held == [id(p) for p in theirs]
    assert torch.equal(there.batch[0], torch.ones(2, 64))
