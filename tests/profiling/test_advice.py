"""The changes that would free most, and batch size against memory, on simulated cards."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from pinned import IS_PINNED
from timm.layers import set_fused_attn, use_fused_attn
from torch import nn

from memfit import Precision, StepOptions, Workload
from memfit.backends.simulated import SimulatedBackend
from memfit.backends.traces import TraceCache
from memfit.cards import Gpu, find_gpu
from memfit.profiling import advise, card_lines, profile_gpu
from memfit.records import Change
from memfit.step.training_step import TrainingStep
from memfit.units import GIB

RTX3090 = find_gpu("rtx3090")


def step_of(subject: str | Workload = "test_vit.r160_in1k", **options: object) -> TrainingStep:
    chosen: dict[str, object] = {"precision": Precision.FP32, **options}
    if isinstance(subject, str):
        chosen = {"optimizer": "adamw", "image_size": (96, 96), **chosen}
    return TrainingStep(subject=subject, options=StepOptions(**chosen))  # type: ignore[arg-type]


def advice_for(step: TrainingStep, batch_size: int, gpu: Gpu = RTX3090) -> tuple[Change, ...]:
    traces = TraceCache()
    profile = profile_gpu(step, batch_size, gpu, traces=traces).profile
    return advise(profile, step, SimulatedBackend(gpu, traces=traces))


def test_advice_is_what_the_changes_give() -> None:
    """Each figure is the peak of the changed step, and the best change comes first."""
    changes = advice_for(step_of(), 256)
    assert len(changes) == 3
    freed = [change.freed_bytes for change in changes]
    assert freed == sorted(freed, reverse=True)
    by_option = {change.how: change for change in changes}
    change = by_option["--grad-checkpointing"]
    checkpointed = step_of(grad_checkpointing=True)
    assert change.total_bytes == profile_gpu(checkpointed, 256, RTX3090).profile.peak.total_bytes
    before = profile_gpu(step_of(), 256, RTX3090).profile.peak.total_bytes
    assert change.freed_bytes == before - change.total_bytes


def test_what_is_on_is_not_advised() -> None:
    """A switch that the step already has is not advised."""
    changes = advice_for(
        step_of(precision=Precision.BF16, grad_checkpointing=True, optimizer="sgd"), 32
    )
    options = {change.how.split()[0] for change in changes}
    assert not options & {"--grad-checkpointing", "--precision"}


def test_a_card_without_bf16_is_advised_fp16() -> None:
    """Only precisions that the card has are advised."""
    changes = advice_for(step_of(), 256, find_gpu("t4"))
    precisions = {change.how for change in changes if change.how.startswith("--precision")}
    assert precisions == {"--precision amp-fp16"}


def test_a_model_without_the_switch_is_passed_over() -> None:
    """A workload that cannot checkpoint gets other advice."""
    workload = Workload(
        nn.Sequential(nn.Linear(2000, 2000), nn.ReLU(), nn.Linear(2000, 2000)),
        (torch.randn(2, 2000),),
        lambda outputs: outputs.float().sum(),
        "adamw",
    )
    changes = advice_for(step_of(workload, optimizer="adamw"), 4096)
    assert changes
    assert "--grad-checkpointing" not in {change.how for change in changes}


@pytest.mark.usefixtures("attention_written_out")
def test_fused_attention_that_was_turned_off() -> None:
    """If timm was told not to use it, its effect is simulated, and the switch is put back."""
    step = step_of(precision=Precision.BF16, image_size=(160, 160))
    changes = advice_for(step, 256)
    assert not use_fused_attn()
    set_fused_attn(enable=True)
    change = {change.how: change for change in changes}["TIMM_FUSED_ATTN=1"]
    assert change.total_bytes == profile_gpu(step, 256, RTX3090).profile.peak.total_bytes


def test_lines_meet_the_cards() -> None:
    """Lines share batch sizes and rise, and the largest batch is that of a probe.

    Older releases of cuDNN take smaller workspaces for some larger batches, so a line can dip.
    """
    traces = TraceCache()
    cards = [find_gpu("rtx3090", total_bytes=size * GIB) for size in (1, 2)]
    step = step_of()
    lines = card_lines([(SimulatedBackend(card, traces=traces), step) for card in cards], 8)
    assert [size for size, _ in lines[0].points] == [size for size, _ in lines[1].points]
    for line, card in zip(lines, cards, strict=True):
        taken = [num_bytes for _, num_bytes in line.points]
        rises = 1 if IS_PINNED else 0.95
        assert all(later >= rises * earlier for earlier, later in itertools.pairwise(taken))
        assert taken[-1] > 2 * taken[0]
        assert dict(line.points)[8] == taken[1]
        edge = line.max_batch_size
        assert edge is not None
        backend = SimulatedBackend(card)
        assert backend.trial(step, edge).fits
        assert not backend.trial(step, edge + 1).fits
        assert line.max_batch_bytes is not None
        assert line.max_batch_bytes <= card.total_bytes


def test_a_card_that_takes_nothing() -> None:
    """Its line is drawn, without a largest batch."""
    tiny = dataclasses.replace(RTX3090, total_bytes=RTX3090.context_bytes + 1)
    (line,) = card_lines([(SimulatedBackend(tiny), step_of())], 4)
    assert (line.max_batch_size, line.max_batch_bytes) == (None, None)


def test_no_cards() -> None:
    """Without cards there are no lines."""
    assert card_lines([], 8) == ()
