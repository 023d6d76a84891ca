"""Recordings of real allocators are joined with notes that were taken during the step."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

import memfit
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
from memfit.records import Action, Role
from memfit.simulation.history import read_history, read_residents
from memfit.units import MIB

# A GPU's allocator: one weight is there; a batch comes, an activation is saved, a temporary ends in
# forward; backward makes a gradient and frees the activation; a segment is taken on the way.
WEIGHT, BATCH, SAVED, SCRATCH, GRADIENT = (MIB * number for number in (1, 10, 20, 30, 40))


def entry(time_us: int, action: str, address: int, size: int, **more: Any) -> dict[str, Any]:
    """Return an entry of `device_traces` as described in `torch.cuda.memory._snapshot`."""
    frames = [
        {"name": "conv2d", "filename": torch.nn.functional.__file__, "line": 1},
        {"name": "forward", "filename": "/home/me/net.py", "line": 7},
        {"name": "fit", "filename": "/home/me/train.py", "line": 9},
    ]
    return {
        "time_us": time_us, "action": action, "addr": address, "size": size, "stream": 0,
        "frames": frames, **more,
    }  # fmt: skip


def freed(time_us: int, address: int, size: int) -> list[dict[str, Any]]:
    return [
        entry(time_us, action, address, size) for action in ("free_requested", "free_completed")
    ]


SNAPSHOT: dict[str, Any] = {
    "segments": [
        {
            "device": 0,
            "address": WEIGHT,
            "total_size": 20 * MIB,
            "blocks": [
                {"size": 4 * MIB, "requested_size": 4 * MIB - 100, "state": "active_allocated"},
                {"size": MIB, "state": "active_allocated"},
                {"size": 15 * MIB, "state": "inactive"},
            ],
        },
        {"device": 1, "address": 0, "total_size": 2 * MIB, "blocks": []},
    ],
    "device_traces": [
        [
            entry(90, "alloc", 7 * MIB, MIB),
            entry(110, "alloc", BATCH, 2 * MIB),
            entry(120, "alloc", SAVED, 3 * MIB),
            entry(121, "alloc", SCRATCH, 5 * MIB),
            *freed(122, SCRATCH, 5 * MIB),
            {"action": "snapshot", "time_us": 125, "size": 0, "addr": 0, "stream": 0},
            entry(130, "segment_alloc", 100 * MIB, 20 * MIB),
            entry(131, "alloc", GRADIENT, 4 * MIB),
            *freed(132, SAVED, 3 * MIB),
            entry(133, "alloc", SCRATCH, 3 * MIB),
            *freed(134, SCRATCH, 3 * MIB),
            *freed(150, GRADIENT, 4 * MIB),
        ],
        [],
    ],
}
NOTES = Notes(
    phases=(
        PhaseStart(time_ns=105_000, name="forward"),
        PhaseStart(time_ns=125_000, name="backward"),
        PhaseStart(time_ns=140_000, name="optimizer"),
    ),
    work=(
        ModuleActive(time_ns=106_000, module="(batch)", is_forward=False),
        ModuleActive(time_ns=115_000, module="conv", is_forward=True),
        ModuleActive(time_ns=124_000, module="(loss)", is_forward=False),
        ModuleActive(time_ns=126_000, module="conv", is_forward=False),
    ),
    settled=(
        KnownBlock(time_ns=101_000, address=WEIGHT, role=Role.PARAMETERS, module="conv"),
        KnownBlock(time_ns=112_000, address=BATCH, role=Role.INPUTS, module="(batch)"),
        KnownBlock(time_ns=139_000, address=GRADIENT, role=Role.GRADIENTS, module="conv"),
    ),
)


def test_a_gpus_history_becomes_a_profile() -> None:
    """Every block has its role, module and line, and the series are the allocator's."""
    residents, reserved = read_residents(SNAPSHOT["segments"], device_index=0)
    events = events_of(
        read_history(SNAPSHOT["device_traces"][0], since_ns=100_000), line_of=line_of
    )
    timeline, blocks = assemble(events, residents, NOTES, reserved_bytes=reserved)
    found = [(block.role, block.module, block.held_bytes // MIB) for block in blocks]
    assert found == [
        (Role.PARAMETERS, "conv", 4),
        (Role.WORKSPACES, "(before the step)", 1),
        (Role.INPUTS, "(batch)", 2),
        (Role.ACTIVATIONS, "conv", 3),
        (Role.TEMPORARIES, "conv", 5),
        (Role.GRADIENTS, "conv", 4),
        (Role.TEMPORARIES, "conv", 3),
    ]
    assert [value // MIB for value in timeline.allocated_bytes] == [
        7,
        10,
        15,
        10,
        14,
        11,
        14,
        11,
        7,
    ]
    assert [value // MIB for value in timeline.reserved_bytes] == [20] * 4 + [40] * 5
    assert [(phase.name, phase.begin) for phase in timeline.phases] == [
        ("forward", 0),
        ("backward", 4),
        ("optimizer", 8),
    ]
    saved = next(block for block in blocks if block.role is Role.ACTIVATIONS)
    assert (saved.operation, saved.source_line) == ("conv2d", "net.py:7")
    peak = peak_of(blocks, timeline)
    assert (peak.phase, peak.moment, peak.total_bytes) == ("backward", 4, 40 * MIB)
    assert peak.bytes_of(Role.SLACK) == 100
    assert peak.bytes_of(Role.FRAGMENTATION) == 26 * MIB


def test_recomputed_activations() -> None:
    """A block made by forward inside backward is an activation if it outlives recomputation."""
    history = [
        entry(127, "alloc", SAVED, MIB),
        entry(128, "alloc", SCRATCH, MIB),
        *freed(129, SCRATCH, MIB),
        *freed(135, SAVED, MIB),
    ]
    work = (
        ModuleActive(time_ns=126_000, module="conv", is_forward=True),
        ModuleActive(time_ns=130_000, module="conv", is_forward=False),
    )
    notes = Notes(phases=NOTES.phases, work=work, settled=())
    events = events_of(read_history(history), line_of=line_of)
    _, blocks = assemble(events, (), notes, reserved_bytes=0)
    assert [block.role for block in blocks] == [Role.ACTIVATIONS, Role.TEMPORARIES]


def test_copies_are_known_by_their_size() -> None:
    """In forward, a block of half the size of a module's weight is autocast's copy.

    A block that is left when the step has ended belongs to the model.
    """
    history = [entry(120, "alloc", SAVED, MIB), entry(121, "alloc", SCRATCH, 2 * MIB)]
    notes = Notes(
        phases=NOTES.phases, work=NOTES.work, settled=(), copies={"conv": frozenset({MIB})}
    )
    events = events_of(read_history(history), line_of=line_of)
    _, blocks = assemble(events, (), notes, reserved_bytes=None)
    assert [block.role for block in blocks] == [Role.AUTOCAST_COPIES, Role.BUFFERS]
    assert {event.action for event in events} == {Action.ALLOC}


def test_lines_beyond_memfit_are_not_the_steps() -> None:
    """The caller of the profile is not part of the step; torch and Python are not either."""
    inner = ((torch.nn.functional.__file__, 5), (contextlib.__file__, 6))
    asked = ((memfit.__file__, 1), ("/home/me/ask.py", 2))
    assert line_of((*inner, ("/home/me/net.py", 3), *asked)) == "net.py:3"
    assert line_of((*inner, *asked)) is None
    assert line_of(inner) is None
    assert line_of([("torch/nn/modules/linear.py", 1), ("timm/layers/mlp.py", 4)]) == (
        "timm/layers/mlp.py:4"
    )
