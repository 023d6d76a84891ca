"""The batch size of a command: which runs are made, and what memfit says if they show little.

These runs are only computed. `test_run.py` has real runs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from memfit.cards import find_gpu
from memfit.errors import DoesNotFitError, StepCrashedError, UsageError
from memfit.records import (
    Capacity,
    HeldBytes,
    Rehearsal,
    RehearsalEnd,
    RehearsedProcess,
    Source,
)
from memfit.rehearsal import script_runs
from memfit.rehearsal.ranks import LoneRank
from memfit.rehearsal.run import Rehearsed
from memfit.rehearsal.scripts import ScriptSearch, plan_command, probe_command
from memfit.units import KIB, MIB

from .made_scripts import MadeScript, made_process, process_of

CARD = find_gpu("rtx3060")
BOUNDS = ScriptSearch(gpu=CARD, environment={"CARD": "1"})
COMMAND = (sys.executable, "train.py", "--batch-size", "{}", "--accumulate", "{steps}")


@dataclasses.dataclass
class Runs:
    """Runs of a command with a number of bytes for each sample and for accumulated gradients."""

    sample_bytes: int = 10 * MIB
    gradient_bytes: int = 100 * MIB
    block_bytes: int = 1
    num_samples: int = 1 << 20
    exit_code: int = 0
    seen: list[tuple[Sequence[str], Mapping[str, str]]] = dataclasses.field(default_factory=list)
    ranks: list[LoneRank | None] = dataclasses.field(default_factory=list)

    def __call__(
        self, words: Sequence[str], gpu: Any, variables: Mapping[str, str], **_options: Any
    ) -> Rehearsed:
        self.seen.append((tuple(words), dict(variables)))
        self.ranks.append(_options.get("lone_rank"))
        numbers = [int(word) for word in (*words, *variables.values()) if word.isdecimal()]
        batch_size = numbers[0]
        steps = int(words[words.index("--accumulate") + 1]) if "--accumulate" in words else 1
        needed = 500 * MIB + batch_size * self.sample_bytes
        needed += self.gradient_bytes if steps > 1 else 0
        needed = -(-needed // self.block_bytes) * self.block_bytes
        fits = needed <= CARD.usable_bytes
        num_steps = 5 if batch_size <= self.num_samples and not self.exit_code else 0
        reserved = min(needed, CARD.usable_bytes) if num_steps else 500 * MIB
        end = RehearsalEnd.SETTLED if fits or not num_steps else RehearsalEnd.OUT_OF_MEMORY
        process = made_process(
            HeldBytes(requested_bytes=reserved, allocated_bytes=reserved, reserved_bytes=reserved),
            num_steps=num_steps,
        )
        end = RehearsalEnd.FAILED if self.exit_code else end
        return ended(words, process, end, exit_code=self.exit_code)


def ended(
    words: Sequence[str],
    process: RehearsedProcess,
    end: RehearsalEnd,
    *,
    exit_code: int = 0,
    requests: Mapping[str, Any] | None = None,
) -> Rehearsed:
    """Return a run of one process."""
    rehearsal = Rehearsal(
        command=tuple(words),
        device=CARD.name,
        capacity=Capacity(
            usable_bytes=CARD.usable_bytes, total_bytes=CARD.total_bytes, origin="made up"
        ),
        context_bytes=CARD.context_bytes,
        end=end,
        exit_code=exit_code,
        processes=(process,),
        notes=(),
        seconds=1.0,
    )
    return Rehearsed(
        rehearsal=rehearsal,
        process=process,
        history=None,
        last_words="one\nValueError: two\n",
        requests=requests,
    )


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    made = Runs()
    monkeypatch.setattr(script_runs, "rehearse_command", made)
    return made


EDGE = (CARD.usable_bytes - 500 * MIB) // (10 * MIB)


def test_the_edge_is_proved_in_few_runs(runs: Runs) -> None:
    """One sample more than the largest batch size was tried, and memory ran out."""
    found = probe_command(COMMAND[:4], BOUNDS)
    assert (found.max_batch_size, found.proved) == (EDGE, True)
    assert found.source is Source.REHEARSED
    beyond = found.trial_at(EDGE + 1)
    assert beyond is not None
    assert not beyond.fits
    assert len(runs.seen) == len(found.trials) <= 8
    stand = found.recommended_batch_size
    assert stand is not None
    trial = found.trial_at(stand)
    assert trial is not None
    assert trial.peak_reserved_bytes is not None
    assert 0.9 < trial.peak_reserved_bytes / CARD.usable_bytes <= 0.95


def test_the_requests_of_the_first_runs_say_which_batch_sizes_to_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reserved bytes alone do not, where the allocator gives back its cache and asks again."""
    made = MadeScript(
        weight_bytes=(45 * MIB, 30 * MIB, 87 * MIB),
        sample_bytes=(996 * KIB, 1982 * KIB, 1286 * KIB),
        scratch_bytes=88 * KIB,
    )

    def run(words: Sequence[str], *_given: Any, **_options: Any) -> Rehearsed:
        trial, requests = made.run(int(words[-1]), CARD.usable_bytes)
        end = RehearsalEnd.SETTLED if trial.fits else RehearsalEnd.OUT_OF_MEMORY
        return ended(words, process_of(trial), end, requests=requests if trial.fits else None)

    monkeypatch.setattr(script_runs, "rehearse_command", run)
    found = probe_command(COMMAND[:4], BOUNDS)
    assert found.proved
    stand = found.recommended_batch_size
    assert stand is not None
    trials = {trial.batch_size: trial for trial in found.trials}
    assert trials[found.max_batch_size].num_alloc_retries
    assert not trials[stand].num_alloc_retries
    assert (trials[stand].peak_reserved_bytes or 0) > 0.9 * CARD.usable_bytes
    assert len(found.trials) == 5


def test_no_batch_size_is_run_twice(runs: Runs) -> None:
    """Each run is a process of its own: a failure cannot have changed what the next one finds."""
    runs.block_bytes = 700 * MIB
    found = probe_command(COMMAND[:4], BOUNDS)
    sizes = [trial.batch_size for trial in found.trials]
    assert len(set(sizes)) == len(sizes)


def test_the_first_run_says_how_much_a_gpu_of_this_machine_has(runs: Runs) -> None:
    """So its search also reads the bytes, and does not double and bisect."""
    found = probe_command(COMMAND[:4], dataclasses.replace(BOUNDS, gpu=None))
    assert (found.max_batch_size, found.proved) == (EDGE, True)
    assert len(runs.seen) == len(found.trials) <= 6


def test_a_batch_size_may_stand_in_an_override_or_a_variable(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`{}` may be in `key=value`, in `NAME={}` before the program, or in a set variable."""
    probe_command((sys.executable, "train.py", "data.batch={}"), BOUNDS)
    assert runs.seen[0][0][2] == "data.batch=2"
    assert runs.seen[0][1] == {"CARD": "1"}
    runs.seen.clear()
    probe_command(("BATCH={}", sys.executable, "train.py"), BOUNDS)
    assert runs.seen[0] == ((sys.executable, "train.py"), {"CARD": "1", "BATCH": "2"})
    runs.seen.clear()
    monkeypatch.setenv("BATCH", "{}")
    probe_command((sys.executable, "train.py"), BOUNDS)
    assert runs.seen[0] == ((sys.executable, "train.py"), {"CARD": "1", "BATCH": "2"})


def test_a_data_set_that_is_too_small_bounds_the_search(runs: Runs) -> None:
    """A run without a step proves nothing. The answer says where the search stopped."""
    runs.num_samples = 300
    found = probe_command(COMMAND[:4], BOUNDS)
    assert found.max_batch_size <= 300
    assert not found.proved
    assert "takes no optimizer step" in found.notes[0]
    assert all(trial.num_iterations for trial in found.trials if trial.fits)


def test_a_command_that_fails_ends_the_search(runs: Runs) -> None:
    """The error has the last lines that the command printed."""
    runs.exit_code = 7
    with pytest.raises(StepCrashedError, match=r"exit code 7[^Z]*ValueError: two"):
        probe_command(COMMAND[:4], BOUNDS)
    assert len(runs.seen) == 1


def test_what_fits_nowhere_is_said_so(runs: Runs) -> None:
    """The message says that the smallest batch does not fit."""
    runs.sample_bytes = 100 * CARD.total_bytes
    with pytest.raises(DoesNotFitError, match="even at batch size 1"):
        probe_command(COMMAND[:4], BOUNDS)


def test_a_plan_adds_up_and_was_tried(runs: Runs) -> None:
    """The micro-batch is the largest equal part that fits beside accumulated gradients."""
    found = plan_command(COMMAND, 4096, BOUNDS, world_size=2)
    assert found.micro_batch_size * found.accumulation_steps * 2 == 4096
    assert (found.micro_batch_size, found.accumulation_steps) == (1024, 2)
    assert found.command == (*COMMAND[:3], "1024", "--accumulate", "2")
    assert found.command == runs.seen[-1][0]
    whole = plan_command(COMMAND, 512, BOUNDS)
    assert (whole.micro_batch_size, whole.accumulation_steps) == (512, 1)
    assert len(whole.trials) == 1


def test_a_plan_shows_the_variables_that_it_trained_with(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that it prints is whole, also if a place is in a variable that was set."""
    monkeypatch.setenv("MICRO_BATCH", "{}")
    found = plan_command((*COMMAND[:3], "{}", "--accumulate", "{steps}"), 4096, BOUNDS)
    assert found.command[0] == f"MICRO_BATCH={found.micro_batch_size}"
    assert (found.command[1:], found.accumulation_steps) == (runs.seen[-1][0], 4)
    assert runs.seen[-1][1] == {"CARD": "1", "MICRO_BATCH": "1024"}


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (COMMAND[:2], r"no \{\} for the batch size"),
        ((*COMMAND[:3], "8"), r"no \{\} for the batch size"),
    ],
)
def test_a_place_for_the_batch_size_is_needed(command: tuple[str, ...], sentence: str) -> None:
    """The message says what to write."""
    with pytest.raises(UsageError, match=sentence):
        probe_command(command, BOUNDS)


def test_each_run_is_one_rank_of_many(runs: Runs) -> None:
    """The notes say so, or that a process was alone although there are several ranks."""
    rank = LoneRank(rank=0, world_size=8)
    bounds = dataclasses.replace(BOUNDS, lone_rank=rank)
    assert "rank 0 of 8 alone" in probe_command(COMMAND[:4], bounds).notes[0]
    assert "rank 0 of 8 alone" in plan_command(COMMAND, 4096, bounds, world_size=8).notes[0]
    assert set(runs.ranks) == {rank}
    alone = plan_command(COMMAND, 4096, BOUNDS, world_size=8)
    assert "what 8 ranks add on each of them is not counted" in alone.notes[0]
    launched = ("torchrun", *COMMAND[1:])
    assert not plan_command(launched, 4096, BOUNDS, world_size=8).notes
    assert not plan_command(COMMAND, 4096, BOUNDS).notes


def test_a_plan_needs_both_places_and_an_equal_share(runs: Runs) -> None:
    """A command takes one batch size for all ranks."""
    with pytest.raises(UsageError, match=r"no \{steps\} for the accumulation steps"):
        plan_command(COMMAND[:4], 64, BOUNDS)
    with pytest.raises(UsageError, match="Give 63 or 66"):
        plan_command(COMMAND, 64, BOUNDS, world_size=3)
    assert not runs.seen


def test_bounds_are_checked() -> None:
    """Wrong bounds are refused before anything runs."""
    with pytest.raises(UsageError, match="headroom"):
        ScriptSearch(gpu=CARD, environment={}, headroom=1.0)
    with pytest.raises(UsageError, match="multiple_of"):
        ScriptSearch(gpu=CARD, environment={}, multiple_of=0)
