"""One plan for ranks that have different cards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import memfit
from memfit.cli import main
from memfit.errors import DoesNotFitError, UsageError
from memfit.records import Plan, Precision, Source
from memfit.step.workload import Workload


def workload(width: int = 512) -> Workload:
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 8))
    batch = (torch.zeros(2, 64), torch.zeros(2, dtype=torch.long))
    return Workload(model, batch, nn.CrossEntropyLoss(), "adamw")


def plan(samples: int, *gpus: str, **options: Any) -> Plan:
    options = {"engine": "simulate", **options}
    return memfit.plan_together(workload(), samples, gpus=gpus, **options)


def test_each_card_takes_the_share_that_it_has_room_for() -> None:
    """Every rank has as many micro-batches, each was tried, and each keeps the headroom."""
    found = plan(30_000_000, "rtx3090", "rtx3060", "rtx3060")
    big, small, last = found.ranks
    assert sum(part.share for part in found.ranks) == found.effective_batch_size == 30_000_000
    assert small == last or abs(small.share - last.share) == 1
    assert 1.8 < big.share / small.share < 2.4
    assert found.accumulation_steps > 1
    assert {len(part.micro_batch_sizes) for part in found.ranks} == {found.accumulation_steps}
    assert found.device == "NVIDIA GeForce RTX 3090, 2 x NVIDIA GeForce RTX 3060"
    assert (found.micro_batch_sizes, found.world_size) == (big.micro_batch_sizes, 3)
    assert found.options.accumulate
    for rank, part in enumerate(found.ranks):
        size = found.micro_batch_size_of(rank)
        assert size <= part.recommended_micro_batch_size
        assert any(trial.batch_size == size and trial.fits for trial in part.trials)
        assert part.peak_reserved_bytes is not None
        assert part.peak_reserved_bytes <= part.capacity.usable_bytes * 0.95
        assert found.share_of(rank) == part.share
    assert not found.is_even
    assert "what 3 ranks add" in found.remarks[-1].lower()
    assert found.to_dict()["ranks"][1]["share"] == small.share


def test_a_share_that_fits_whole_is_not_accumulated() -> None:
    """The precision is one that every card has."""
    found = plan(100, "rtx3090", "t4")
    assert found.accumulation_steps == 1
    assert not found.options.accumulate
    assert found.options.precision is Precision.AMP_FP16
    assert sum(part.share for part in found.ranks) == 100
    assert plan(100, "rtx3090", "rtx3060").options.precision is Precision.AMP_BF16


@pytest.mark.rehearses
def test_ranks_are_rehearsed_in_their_wrapper() -> None:
    """Each card is rehearsed with DDP's buckets, and the plan's own parts fitted."""
    found = plan(9000, "rtx3090", "rtx3060", engine="rehearse", multiple_of=8)
    assert found.source is Source.REHEARSED
    assert found.options.world_size == 2
    assert sum(part.share for part in found.ranks) == 9000


@pytest.mark.parametrize(
    ("gpus", "options", "says"),
    [
        (("t4",), {}, "the card of each rank, at least two"),
        (("t4", "nope"), {}, "nope"),
        (("t4", "l4"), {"precision": "fp8"}, "There is no precision"),
        (("t4", "l4"), {"parallel": "ddp"}, "A simulation cannot try one rank of 2"),
    ],
)
def test_mistakes_get_a_sentence(gpus: tuple[str, ...], options: dict[str, Any], says: str) -> None:
    """It names the value."""
    with pytest.raises(UsageError, match=says):
        plan(64, *gpus, **options)


def test_a_card_that_has_no_room_is_named() -> None:
    """The others do not take its share in silence."""
    with pytest.raises(DoesNotFitError, match="does not fit"):
        memfit.plan_together(
            workload(2**21), 64, gpus=["rtx3090", "rtx3060"], memory="1GiB", engine="simulate"
        )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--gpu", "t4"), "--together has one rank on each card: give several"),
        (("--gpu", "t4", "--gpu", "l4", "--world-size", "2"), "--world-size cannot be given with"),
        (("--gpu", "t4", "--gpu", "l4", "--explore"), "--explore cannot be given with"),
        (("--gpu", "t4", "--gpu", "l4", "--objective", "even"), "--objective cannot be given"),
    ],
)
def test_options_that_do_not_go_together(arguments: tuple[str, ...], says: str) -> None:
    """The exit code is 2."""
    words = ("plan", "resnet18", "--effective-batch", "64", "--together", *arguments)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert says in result.output


def test_the_command_shows_a_row_for_each_rank() -> None:
    """--emit prints what every rank runs."""
    words = ("plan", "test_resnet", "--effective-batch", "4000", "--together", "--image-size", "64")
    cards = ("--gpu", "rtx3090", "--gpu", "rtx3060", "--engine", "simulate")
    result = CliRunner().invoke(main, (*words, *cards, "--emit", "pytorch"))
    assert result.exit_code == 0, result.output
    assert "4000 samples a step over 2 ranks" in result.output
    assert "accumulator = memfit.Accumulator(model, optimizer, sizes[rank]" in result.output
