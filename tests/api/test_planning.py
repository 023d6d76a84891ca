"""`memfit.plan`, `survey_plans` and `explore`, end to end."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import nn

import memfit
from memfit.api import exploring
from memfit.backends.simulated import SimulatedBackend
from memfit.backends.traces import TraceCache
from memfit.cards import find_gpu
from memfit.errors import DoesNotFitError, UsageError
from memfit.planning import SearchOptions, planner
from memfit.records import Objective, Outcome, Precision, Source, Trial
from memfit.step.training_step import TrainingStep

MODEL = "test_vit"
SMALL: dict[str, Any] = {"gpu": "any", "memory": "1GiB", "image_size": 96}


def plan(effective_batch_size: int, **options: Any) -> memfit.Plan:
    found = memfit.plan(MODEL, effective_batch_size, **{**SMALL, **options})
    assert isinstance(found, memfit.Plan)
    return found


def accumulating(trial: Trial) -> bool:
    return trial.num_micro_batches == 2


def test_what_fits_whole_is_one_step() -> None:
    """It is tried as it will run: without gradients beside the activations."""
    found = plan(64)
    assert found.micro_batch_sizes == (64,)
    assert (found.options.accumulate, found.source) == (False, Source.SIMULATED)
    assert [(t.batch_size, accumulating(t)) for t in found.trials] == [(64, False)]
    assert found.peak_reserved_bytes == found.trials[0].peak_reserved_bytes
    assert (found.max_micro_batch_size, found.edge_found) == (64, False)


def test_a_loss_that_is_a_sum_is_told() -> None:
    """Without the remark, the plan's user would weigh it as a mean."""

    def remarks(reduction: str) -> str:
        model = nn.Linear(8, 3)
        batch = (torch.randn(8, 8), torch.randint(3, (8,)))
        loss = nn.CrossEntropyLoss(reduction=reduction)
        workload = memfit.Workload(model, batch, loss, torch.optim.SGD(model.parameters(), lr=0.1))
        found = memfit.plan(workload, 16, gpu="any", memory="1GiB", max_batch_size=8)
        assert isinstance(found, memfit.Plan)
        return " ".join(found.remarks)

    assert "give the Accumulator weight='sum'" in remarks("sum")
    assert "sum" not in remarks("mean")


class Pooled(nn.Module):
    """Pools each channel to one value and normalises it, so it needs at least two samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, 2)."""
        scores: torch.Tensor = self.last(self.norm(self.conv(x).mean((2, 3))))
        return scores


def test_no_part_is_smaller_than_what_the_step_runs_with() -> None:
    """Parts of one sample, which batch norm refuses, are avoided; else there is no plan."""

    def batch(size: int) -> Any:
        return torch.randn(size, 3, 8, 8), torch.randint(2, (size,))

    workload = memfit.Workload(Pooled(), batch, nn.functional.cross_entropy, "sgd")
    on_cpu: dict[str, Any] = {"device": "cpu", "memory": "300MiB"}
    found = memfit.plan(workload, 9, max_batch_size=4, **on_cpu)
    assert found.micro_batch_sizes == (3, 3, 3)
    found = memfit.plan(workload, 17, max_batch_size=8, multiple_of=8, **on_cpu)
    assert found.micro_batch_sizes == (6, 6, 5)
    assert min(trial.batch_size for trial in found.trials) <= 5
    assert "If the parts were multiples of 8, the last one would be too small" in found.remarks[-1]
    says = (
        r"batch of 9 cannot be cut into parts of at most 2 without a part of 1, and .* such a "
        r"part\. Plan for 8 or 10 \(Expected more than 1 value"
    )
    with pytest.raises(UsageError, match=says):
        memfit.plan(workload, 9, max_batch_size=2, **on_cpu)


def test_a_simulated_part_of_one_sample_is_remarked_upon() -> None:
    """A simulation does not know whether such a part runs."""
    assert "One part has a single sample" in plan(9, max_batch_size=2).remarks[0]


def test_what_does_not_fit_whole_accumulates() -> None:
    """It takes the fewest steps; the plan's own micro-batch was tried and keeps the headroom."""
    found = plan(9000)
    assert sum(found.micro_batch_sizes) == 9000
    assert found.accumulation_steps == -(-9000 // found.recommended_micro_batch_size)
    assert found.micro_batch_size <= found.recommended_micro_batch_size
    assert found.recommended_micro_batch_size <= found.max_micro_batch_size
    assert found.edge_found
    own = [t for t in found.trials if t.batch_size == found.micro_batch_size and accumulating(t)]
    assert own[-1].fits
    assert own[-1].peak_reserved_bytes == found.peak_reserved_bytes
    assert found.peak_reserved_bytes is not None
    assert found.peak_reserved_bytes <= 0.95 * found.capacity.usable_bytes
    assert found.options.accumulate
    more = [t for t in found.trials if t.batch_size == found.max_micro_batch_size + 1]
    assert more[-1].outcome is Outcome.OUT_OF_MEMORY
    plain = found.to_dict()
    assert plain["accumulation_steps"] == found.accumulation_steps
    assert plain["trials"][0]["outcome"] == "out_of_memory"


def test_two_steps_need_no_search() -> None:
    """Half of the share is tried at once."""
    edge = plan(9000).recommended_micro_batch_size
    found = plan(2 * edge)
    assert found.micro_batch_sizes == (edge, edge)
    assert len(found.trials) == 2


def test_ranks_share() -> None:
    """A plan is for the share of one rank; it says if the shares differ."""
    assert plan(256, world_size=4).micro_batch_sizes == (64,)
    uneven = plan(30, world_size=4)
    assert uneven.micro_batch_sizes == (8,)
    assert "30 samples cannot be shared equally by 4 ranks" in uneven.remarks[0]


def test_multiples_and_equal_parts() -> None:
    """They are as asked for, and the effective batch never changes."""
    found = plan(2000, multiple_of=16)
    assert sum(found.micro_batch_sizes) == 2000
    assert all(size % 16 == 0 for size in found.micro_batch_sizes[:-1])
    even = plan(2000, objective="even")
    assert even.is_even
    assert even.micro_batch_size * even.accumulation_steps == 2000
    assert even.objective is Objective.EVEN


def test_a_share_below_the_multiple_is_cut_all_the_same() -> None:
    """Rounding up to the multiple would give the whole share."""
    half = memfit.probe(MODEL, **SMALL).max_batch_size // 2 + 1
    found = plan(2 * half, multiple_of=2 * half)
    assert found.micro_batch_sizes == (half, half)


def test_a_single_sample_without_headroom_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller part does not exist."""
    original = SimulatedBackend.trial

    def whole_steps_are_tight(self: SimulatedBackend, step: TrainingStep, batch_size: int) -> Trial:
        trial = original(self, step, batch_size)
        if accumulating(trial):
            return trial
        return dataclasses.replace(trial, num_alloc_retries=1)

    monkeypatch.setattr(SimulatedBackend, "trial", whole_steps_are_tight)
    with pytest.raises(DoesNotFitError, match="memory differs too much"):
        plan(1)


def test_a_limit_of_ones_own_is_kept() -> None:
    """`max_batch_size` bounds whole steps and micro-batches."""
    found = plan(64, max_batch_size=20)
    assert found.micro_batch_sizes == (16, 16, 16, 16)
    assert found.max_micro_batch_size == 20


def test_what_fits_without_headroom_is_remarked() -> None:
    """One step was possible, but without the headroom, or only with allocator retries."""
    probed = memfit.probe(MODEL, headroom=0.0, **SMALL)
    assert probed.recommended_batch_size is not None
    found = plan(probed.recommended_batch_size, headroom=0.2)
    assert found.accumulation_steps == 2
    assert "do fit in one step, but leave less than 20% free" in found.remarks[0]
    found = plan(probed.max_batch_size, headroom=0.0)
    assert "do fit in one step, but need allocator retries" in found.remarks[0]


def test_a_measured_plan_trains() -> None:
    """It is the fastest that was timed on the CPU; Accumulator takes the plan unchanged."""
    model = nn.Sequential(nn.Linear(256, 2**14), nn.Tanh(), nn.Linear(2**14, 1))
    batch = (torch.randn(4, 256), torch.randn(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    workload = memfit.Workload(model, batch, nn.functional.mse_loss, optimizer)
    heard: list[Trial] = []
    found = memfit.plan(
        workload,
        96,
        device="cpu",
        objective="fastest",
        memory="70MiB",
        progress=heard.append,
    )
    assert tuple(heard) == found.trials
    assert found.source is Source.MEASURED
    assert sum(found.micro_batch_sizes) == 96
    assert found.samples_per_second is not None
    assert "fastest" in found.remarks[0] or "faster" in found.remarks[0]
    timed = {t.batch_size for t in found.trials if t.fits and accumulating(t)}
    assert len(timed) >= 3
    accumulator = memfit.Accumulator(model, optimizer, found, loss=nn.functional.mse_loss)
    assert accumulator.step((torch.randn(96, 256), torch.randn(96, 1))).isfinite()


def test_fits_that_are_not_monotone_are_planned_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan whose own micro-batch runs out takes a smaller one."""
    original = SimulatedBackend.trial
    holes = {plan(2000).micro_batch_size}

    def holed(self: SimulatedBackend, step: TrainingStep, batch_size: int) -> Trial:
        trial = original(self, step, batch_size)
        if batch_size in holes:
            trial = dataclasses.replace(trial, outcome=Outcome.OUT_OF_MEMORY)
        return trial

    monkeypatch.setattr(SimulatedBackend, "trial", holed)
    found = plan(2000)
    assert found.micro_batch_size not in holes
    assert sum(found.micro_batch_sizes) == 2000


@pytest.mark.parametrize("is_too_much", [False, True])
def test_a_smaller_part_that_needs_more_counts(
    monkeypatch: pytest.MonkeyPatch, is_too_much: bool
) -> None:
    """The plan's peak is the highest of its parts, and each of them keeps the headroom."""
    original, before = SimulatedBackend.trial, plan(2001)
    large, small = before.micro_batch_size, before.micro_batch_sizes[-1]
    assert large > small
    needed = before.capacity.safe_bytes * (96 if is_too_much else 94) // 100

    def uneven(self: SimulatedBackend, step: TrainingStep, batch_size: int) -> Trial:
        trial = original(self, step, batch_size)
        if batch_size == small:
            trial = dataclasses.replace(trial, peak_reserved_bytes=needed)
        return trial

    monkeypatch.setattr(SimulatedBackend, "trial", uneven)
    found = plan(2001)
    assert (small in found.micro_batch_sizes) is not is_too_much
    assert found.peak_reserved_bytes is not None
    assert (found.peak_reserved_bytes == needed) is not is_too_much
    tried = {t.batch_size for t in found.trials if t.fits and accumulating(t)}
    assert tried >= {*found.micro_batch_sizes}


@pytest.mark.parametrize(
    ("target", "options", "error", "says"),
    [
        (0, {}, UsageError, "effective batch size must be at least 1, not 0"),
        (64.5, {}, UsageError, "must be a whole number, not 64.5"),
        (3, {"world_size": 4}, UsageError, "needs at least one sample. Give at least 4"),
        (64, {"objective": "cheapest"}, UsageError, "choose one of largest, fastest, even"),
        (64, {"objective": "fastest"}, UsageError, "has no real seconds"),
        (64, {"device": "cpu"}, UsageError, "not both"),
        (64, {"headroom": 1.0}, UsageError, "headroom"),
        (64, {"multiple_of": 0}, UsageError, "multiple_of"),
        (4000, {"memory": "460MiB"}, DoesNotFitError, "does not fit even at batch size 1"),
        (4000, {"headroom": 0.999}, DoesNotFitError, "Ask for less headroom"),
        (4000, {"multiple_of": 1500}, DoesNotFitError, "that is a multiple of 1500"),
    ],
)
def test_what_cannot_be_planned_gets_a_sentence(
    target: Any, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    """The error comes before anything runs, where that can be known."""
    with pytest.raises(error, match=says):
        plan(target, **options)


def test_several_cards_are_planned_for_at_once() -> None:
    """They share traces, each has its own precision, and what does not fit says so."""
    survey = memfit.survey_plans("resnet10t", 512, gpus=("t4", "3090"), image_size=64)
    assert [answer.plan is not None for answer in survey.answers] == [True, True]
    first, second = (answer.plan for answer in survey.answers)
    assert first is not None
    assert second is not None
    assert (first.options.precision, second.options.precision) == (
        Precision.AMP_FP16,
        Precision.AMP_BF16,
    )
    little = memfit.survey_plans("resnet18", 512, gpus=("t4", "h200"), memory="800MiB")
    assert [answer.plan is None for answer in little.answers] == [False, True]
    assert "does not fit" in (little.answers[1].reason or "")
    with pytest.raises(UsageError, match="has no real seconds"):
        memfit.survey_plans(MODEL, 512, objective="fastest")


def test_single_changes_are_explored() -> None:
    """First the unchanged step, then the smallest changes; each differs in one thing."""
    exploration = memfit.explore(MODEL, 2000, precision="fp32", **SMALL)
    assert exploration.source is Source.SIMULATED
    assert [alternative.change for alternative in exploration.alternatives] == [
        "channels last",
        "mixed precision (amp-bf16)",
        "gradient checkpointing",
        "optimizer lion",
        "image 64x64",
        "bf16 weights",
    ]
    before = exploration.baseline.options
    changed = [
        {
            field
            for field in before.__dataclass_fields__
            if getattr(alternative.options, field) != getattr(before, field)
        }
        for alternative in exploration.alternatives
    ]
    assert changed == [
        {"channels_last"},
        {"precision"},
        {"grad_checkpointing"},
        {"optimizer"},
        {"image_size"},
        {"precision"},
    ]
    most = exploration.baseline.recommended_micro_batch_size
    assert most is not None
    for alternative in exploration.alternatives:
        assert sum(alternative.micro_batch_sizes) == 2000
    _, amp, checkpointing, _, image, _ = (
        alternative.recommended_micro_batch_size or 0 for alternative in exploration.alternatives
    )
    assert min(amp, checkpointing, image) > most


@pytest.mark.parametrize(
    ("model", "image"),
    [("vit_tiny_patch16_224", 160), ("vit_small_patch14_dinov2", 378), ("resnet10t", 128)],
)
def test_the_smaller_image_is_one_that_the_model_takes(model: str, image: int) -> None:
    """It has whole patches, if the model has patches."""
    exploration = memfit.explore(model, 4, gpu="any", memory="8GiB", num_classes=10)
    (alternative,) = (a for a in exploration.alternatives if a.change.startswith("image"))
    assert alternative.options.image_size == (image, image)
    assert sum(alternative.micro_batch_sizes) == 4


def test_what_does_not_fit_at_all_is_explored_too() -> None:
    """It says which change would make it fit, and which change the model cannot make."""
    exploration = memfit.explore(
        "resnet18", 64, gpu="any", memory="680MiB", precision="fp32", optimizer="adamw"
    )
    assert exploration.baseline.micro_batch_sizes == ()
    assert re.fullmatch(r"needs \d+ MiB at batch size 1", exploration.baseline.reason or "")
    fits = {a.change for a in exploration.alternatives if a.micro_batch_sizes}
    assert fits
    none = memfit.explore("vgg11", 8, gpu="3090", image_size=64, grad_checkpointing=False)
    reasons = {a.change: a.reason for a in none.alternatives}
    assert "has no gradient checkpointing" in (reasons["gradient checkpointing"] or "")


def test_a_workload_is_explored_untouched() -> None:
    """It keeps its optimizer unless that is a name, and it has no image to make smaller."""
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 2))
    batch = (torch.zeros(2, 8), torch.zeros(2, dtype=torch.long))
    by_name = memfit.Workload(model, batch, nn.CrossEntropyLoss(), "adamw")
    exploration = memfit.explore(by_name, 64, gpu="3090")
    assert [a.change for a in exploration.alternatives] == [
        "channels last",
        "gradient checkpointing",
        "optimizer lion",
        "bf16 weights",
    ]
    own = memfit.Workload(model, batch, nn.CrossEntropyLoss(), torch.optim.SGD)
    changes = [a.change for a in memfit.explore(own, 64, gpu="3090").alternatives]
    assert not [change for change in changes if change.startswith("optimizer")]
    assert next(model.parameters()).device.type == "cpu"


def test_a_gpu_that_is_there_is_explored_by_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is explored by simulating its model of card; a CPU cannot be explored."""

    class Posing(SimulatedBackend):
        """Stands in for a real card."""

    posing = Posing(find_gpu("3090"), memory_bytes=2**30, traces=TraceCache())
    monkeypatch.setattr(exploring, "open_backend", lambda *_args, **_kwargs: posing)
    exploration = memfit.explore(MODEL, 64, image_size=96)
    assert exploration.device == "NVIDIA GeForce RTX 3090"
    assert exploration.capacity.usable_bytes == 2**30
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"only GPUs can be simulated\. Give gpu"):
        memfit.explore(MODEL, 64, device="cpu")


def test_the_target_is_checked_before_anything_is_built() -> None:
    """The mistake is reported at once."""
    with pytest.raises(UsageError, match="whole number"):
        planner.PlanTarget.of("64", SearchOptions(), objective="even")
