"""Makes a step's timeline, peak and blocks from the record of a rehearsal.

The step is the one that needs the most memory. If memory ran out, it is the step in which that
happened. The watch notes the addresses of parameters, gradients, optimizer state and inputs
(`rehearsal.watch`).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memfit.errors import UsageError
from memfit.profiling.modules import line_of
from memfit.profiling.peak import peak_of
from memfit.profiling.recorded import (
    KnownBlock,
    ModuleActive,
    Notes,
    PhaseStart,
    assemble,
    events_of,
)
from memfit.records import RecordedStep, Role
from memfit.rehearsal.run import Rehearsed
from memfit.simulation.history import read_history, read_residents

__all__ = ["recorded_step", "write_snapshot"]


def recorded_step(found: Rehearsed) -> RecordedStep:
    """Return the step that a rehearsal's peak comes from.

    Args:
        found: A rehearsal with its history.

    Raises:
        UsageError: Nothing was recorded.
    """
    history, index = _history(found)
    snapshot = history["snapshot"]
    residents, reserved = read_residents(history["before"], device_index=index)
    recorded = read_history(snapshot["device_traces"][index], since_ns=history["since_ns"])
    events = events_of(recorded, line_of=line_of)
    timeline, blocks = assemble(events, residents, _notes(history), reserved_bytes=reserved)
    if not timeline.allocated_bytes:
        raise UsageError("The recorded step allocated nothing, so there is no page.")
    return RecordedStep(
        subject=found.rehearsal.subject,
        number=history["step"],
        num_micro_batches=max(1, sum(phase.name == "forward" for phase in timeline.phases)),
        timeline=timeline,
        peak=peak_of(blocks, timeline, context_bytes=found.rehearsal.context_bytes),
        blocks=blocks,
    )


def write_snapshot(found: Rehearsed, path: Path) -> None:
    """Write what `torch.cuda.memory._snapshot()` returned at the end of that step.

    Args:
        found: A rehearsal with its history.
        path: The file to write.

    Raises:
        UsageError: Nothing was recorded, or the file cannot be written.
    """
    history, _ = _history(found)
    try:
        path.write_bytes(pickle.dumps(history["snapshot"]))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error


def _history(found: Rehearsed) -> tuple[Mapping[str, Any], int]:
    if found.history is None or found.process is None:
        raise UsageError("No process of the command used the card, so nothing was recorded.")
    return found.history, found.process.device_index


def _notes(history: Mapping[str, Any]) -> Notes:
    return Notes(
        phases=tuple(PhaseStart(time_ns=time, name=name) for time, name in history["phases"]),
        work=tuple(
            ModuleActive(time_ns=time, module=module, is_forward=is_forward)
            for time, module, is_forward in history["work"]
        ),
        settled=tuple(
            KnownBlock(time_ns=time, address=address, role=Role(role), module=module)
            for time, address, role, module in history["settled"]
        ),
        copies={module: frozenset(sizes) for module, sizes in history["copies"].items()},
    )
