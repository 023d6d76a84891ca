"""Finds the batch size of a user's own command by running it with different batch sizes.

In the command's words, `{}` stands for the batch size and `{steps}` for the accumulation steps.
Each trial runs the command until its peak has settled. This takes long, so few trials are made.
The requests of the first runs say which batch sizes are worth one (`memfit.rehearsal.forecast`).
Where they do not, `memfit.search` chooses from the bytes of the earlier runs.
"""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Sequence
from typing import Final

from memfit import search
from memfit.errors import DoesNotFitError, UsageError
from memfit.partition import check_target, equal_part
from memfit.records import CommandPlan, CommandProbe
from memfit.rehearsal.ranks import launcher_of
from memfit.rehearsal.script_runs import (
    BATCH,
    STEPS,
    NoStepError,
    Progress,
    Runs,
    ScriptSearch,
)

__all__ = ["Progress", "ScriptSearch", "plan_command", "probe_command"]

_MAX_SHRINKS: Final = 12


def probe_command(
    template: Sequence[str], bounds: ScriptSearch, *, progress: Progress = lambda _trial: None
) -> CommandProbe:
    """Find the largest batch size of a command that fits, and prove it.

    Args:
        template: The command's words. `{}` is the batch size. Words such as `NAME={}` before the
            program are environment variables. Those of this process that are set to `{}` go
            before them.
        bounds: The settings of the search.
        progress: Called with each trial.

    Raises:
        UsageError: No word has a place for the batch size, or there is no such command.
        DoesNotFitError: Not even the smallest batch fits.
        StepCrashedError: The command failed by itself.
    """
    template = (*_set_in_environment(), *template)
    _check(template, needs=(BATCH,))
    start = time.perf_counter()
    runs = Runs(template, bounds, progress)
    found, notes = _largest(runs, bounds.max_batch_size or search.DEFAULT_CEILING)
    assert found.batch_size is not None
    recommended = runs.recommended(found)
    return CommandProbe(
        command=template,
        device=runs.last.device,
        source=runs.last.source,
        capacity=runs.last.capacity,
        max_batch_size=found.batch_size,
        recommended_batch_size=recommended,
        proved=found.proved,
        headroom=bounds.headroom,
        multiple_of=bounds.multiple_of,
        trials=tuple(runs.trials),
        notes=(*notes, *_rank_notes(template, bounds), *runs.doubts()),
        seconds=time.perf_counter() - start,
    )


def plan_command(
    template: Sequence[str],
    effective_batch_size: int,
    bounds: ScriptSearch,
    *,
    world_size: int = 1,
    progress: Progress = lambda _trial: None,
) -> CommandPlan:
    """Turn an effective batch size into a command that fits, and prove it.

    Args:
        template: The command's words. `{}` is the micro-batch, `{steps}` the accumulation steps.
        effective_batch_size: The samples in each optimizer step, over all ranks.
        bounds: The settings of the search.
        world_size: The number of ranks that share the samples.
        progress: Called with each trial.

    Raises:
        UsageError: `{}` or `{steps}` is missing, or the samples cannot be shared equally.
        DoesNotFitError: Not even the smallest micro-batch fits.
        StepCrashedError: The command failed by itself.
    """
    template = (*_set_in_environment(), *template)
    _check(template, needs=(BATCH, STEPS))
    samples, ranks = check_target(effective_batch_size, world_size)
    share, rest = divmod(samples, ranks)
    if rest:
        raise UsageError(
            f"{samples} samples cannot be shared equally by {ranks} ranks, and a "
            f"command has one batch size for all ranks. Give {share * ranks} or "
            f"{(share + 1) * ranks}."
        )
    start = time.perf_counter()
    runs = Runs(template, bounds, progress)
    micro = _micro_batch(runs, share, bounds)
    return CommandPlan(
        template=template,
        command=runs.words(micro, share // micro),
        device=runs.last.device,
        source=runs.last.source,
        capacity=runs.last.capacity,
        effective_batch_size=samples,
        world_size=ranks,
        micro_batch_size=micro,
        accumulation_steps=share // micro,
        headroom=bounds.headroom,
        trials=tuple(runs.trials),
        notes=(*_rank_notes(template, bounds, num_ranks=ranks), *runs.doubts()),
        seconds=time.perf_counter() - start,
    )


def _rank_notes(
    template: Sequence[str], bounds: ScriptSearch, *, num_ranks: int = 1
) -> tuple[str, ...]:
    """Say that runs were one rank of many, or that they were not although there are several."""
    if bounds.lone_rank is not None:
        return (bounds.lone_rank.note,)
    if num_ranks == 1 or launcher_of(template) is not None:
        return ()
    return (
        (
            f"Each run was one process alone, so what {num_ranks} ranks add on each of them is not "
            "counted. With --gpu, one rank is rehearsed."
        ),
    )


def _micro_batch(runs: Runs, share: int, bounds: ScriptSearch) -> int:
    """Return the largest equal part of a share that fits. It has been tried."""
    if runs.has_headroom(runs.trial(share, 1)):
        return share
    # Accumulation keeps gradients between micro-batches, so at least two must run.
    runs.num_accumulated = 2
    found, _ = _largest(runs, max(1, share - 1))
    largest = runs.recommended(found) or found.batch_size
    while largest:
        part = equal_part(share, largest, multiple_of=bounds.multiple_of)
        if part is None:
            break
        if runs.has_headroom(runs.trial(part, share // part)):
            return part
        largest = part - 1
    raise DoesNotFitError(
        f"No equal part of {share} samples fits {runs.last.device} with {bounds.headroom:.0%} kept "
        "free."
    )


def _largest(runs: Runs, ceiling: int) -> tuple[search.Found, list[str]]:
    """Search below the batch sizes at which the command takes no optimizer step."""
    notes: list[str] = []
    for _ in range(_MAX_SHRINKS):
        try:
            hint = runs.expected_edge(ceiling)
            found = search.find_largest(
                runs.of_batch_size,
                capacity_bytes=runs.capacity_bytes,
                hint=hint,
                known=tuple(runs.comparable()),
                ceiling=ceiling,
                starts_afresh=True,
                stop_bytes=runs.stop_bytes,
            )
        except NoStepError as stop:
            low = max((trial.batch_size for trial in runs.fits()), default=1)
            ceiling = max(low, math.isqrt(low * stop.batch_size))
            note = (
                f"At {stop.batch_size} samples the command takes no optimizer step. Its "
                f"data set may be smaller. Nothing above {ceiling} was tried."
            )
            notes = [note]
            continue
        if found.batch_size is None:
            raise DoesNotFitError(
                f"{shlex.join(runs.template)} does not fit {runs.last.device}, even at batch size "
                f"{found.trials[-1].batch_size}: {found.trials[-1].message or 'out of memory'}"
            )
        return found, notes
    raise UsageError(
        "At most batch sizes the command takes no optimizer step, so memfit "
        "cannot find the largest."
    )


def _check(template: Sequence[str], *, needs: Sequence[str]) -> None:
    meanings = {BATCH: "the batch size", STEPS: "the accumulation steps"}
    for place in needs:
        if not any(place in word for word in template):
            raise UsageError(
                f"The command has no {place} for {meanings[place]}: write, say, -- python train.py "
                "--batch-size {}" + (" --grad-accum-steps {steps}." if STEPS in needs else ".")
            )


def _set_in_environment() -> list[str]:
    """Return the variables that are set to a place, as words before a program."""
    return [
        f"{name}={value}"
        for name, value in os.environ.items()
        if value in (BATCH, STEPS) and name.isidentifier()
    ]
