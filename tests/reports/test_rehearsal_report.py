"""Rehearsals as text and as pages, made from invented records."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

from rich.console import Console, RenderableType

from memfit.records import (
    Capacity,
    DeviceRead,
    HeldBytes,
    ReadKind,
    Rehearsal,
    RehearsalEnd,
    RehearsedPhase,
    RehearsedProcess,
    RehearsedStep,
    Shortage,
)
from memfit.reports import rehearsal_page
from memfit.reports.rehearsal import doubts, render, render_several, short_line
from memfit.units import GIB, MIB


def held(mebibytes: int) -> HeldBytes:
    return HeldBytes(
        requested_bytes=mebibytes * MIB,
        allocated_bytes=(mebibytes + 1) * MIB,
        reserved_bytes=(mebibytes + 20) * MIB,
    )


def step(number: int, mebibytes: int) -> RehearsedStep:
    return RehearsedStep(
        number=number, optimizer="AdamW", peak=held(mebibytes), num_alloc_retries=0
    )


READ = DeviceRead(
    line="/home/user/train.py:12",
    library_line=None,
    kind=ReadKind.NUMBER,
    phase="data",
    num_reads=5,
    num_bytes=20,
    changes_course=False,
)
PROCESS = RehearsedProcess(
    process=4711,
    rank=None,
    num_ranks=None,
    device_index=0,
    torch_version="2.15.0",
    peak=held(1000),
    num_alloc_retries=0,
    num_steps=5,
    steps=(step(1, 900), *(step(number, 1000) for number in range(2, 6))),
    phases=(
        RehearsedPhase(name="forward", peak=held(950)),
        RehearsedPhase(name="backward", peak=held(1000)),
    ),
    reads=(),
    shortages=(),
    has_settled=True,
    follows_modules=True,
    message=None,
)
REHEARSAL = Rehearsal(
    command=("python", "train.py", "--name", "a b"),
    device="NVIDIA GeForce RTX 3060",
    capacity=Capacity(usable_bytes=11 * GIB, total_bytes=12 * GIB, origin="less the context"),
    context_bytes=200 * MIB,
    end=RehearsalEnd.SETTLED,
    exit_code=0,
    processes=(PROCESS,),
    notes=("A note.",),
    seconds=4.5,
)
SHORTAGE = Shortage(
    wanted_bytes=600 * MIB,
    free_bytes=100 * MIB,
    line="/home/user/train.py:7",
    library_line="/env/lib/python3.11/site-packages/timm/models/resnet.py:153",
    module="layer1.0.bn2",
    phase="forward",
    step=1,
    ended_script=True,
)
RAN_OUT = dataclasses.replace(
    REHEARSAL,
    end=RehearsalEnd.OUT_OF_MEMORY,
    exit_code=1,
    processes=(
        dataclasses.replace(
            PROCESS,
            shortages=(SHORTAGE,),
            has_settled=False,
            message="CUDA out of memory. Tried to allocate 600.00 MiB.  See documentation",
        ),
    ),
)


def text(shown: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(shown)
    output: Any = console.file
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    return "\n".join(line.rstrip() for line in lines)


def test_a_rehearsal_that_settled() -> None:
    """The whole text is compared."""
    assert (
        text(render(REHEARSAL))
        == """
python train.py --name 'a b'
on NVIDIA GeForce RTX 3060, rehearsed
11.0 GiB usable: 12.0 GiB less 200 MiB for the CUDA context

Peak 1020 MiB reserved; 1220 MiB of 12.0 GiB with the context; 10.8 GiB left
The peak had settled, so memfit ended the command after 5 optimizer steps.

Peak of each step
  step  requested  allocated  reserved  retries
     1    900 MiB    901 MiB   920 MiB        0
2 to 5   1000 MiB   1001 MiB  1020 MiB        0

Peak of each phase
phase     requested  allocated  reserved
forward     950 MiB    951 MiB   970 MiB
backward   1000 MiB   1001 MiB  1020 MiB

A note.
Rehearsed, not measured: PyTorch's own software ran, its kernels did nothing.
The CUDA context is the catalogue's figure. 1 process, 4.5 s, torch 2.15.0."""
    )


def test_a_shortage_says_where_and_how_much() -> None:
    """It has bytes, line, library, module and torch's own words."""
    shown = text(render(RAN_OUT))
    assert (
        """
Out of memory in step 1, forward: 500 MiB were missing.
asked for  600 MiB
free       100 MiB
line       train.py:7
in         timm/models/resnet.py:153
module     layer1.0.bn2
CUDA out of memory. Tried to allocate 600.00 MiB.
"""
        in shown
    )


def test_a_signal_is_not_called_an_exit_code() -> None:
    """The note beside it names the signal."""
    failed = dataclasses.replace(REHEARSAL, end=RehearsalEnd.FAILED, exit_code=-9)
    shown = text(render(failed))
    assert "A signal ended the command after 5 optimizer steps. The card's memory had not" in shown
    assert "-9" not in shown


def test_ranks_are_one_table() -> None:
    """Each rank has a line that says how it ended."""
    ranks = tuple(
        dataclasses.replace(
            process, rank=rank, num_ranks=2, device_index=rank, peak=held(1000 + rank)
        )
        for rank, process in enumerate((PROCESS, RAN_OUT.processes[0]))
    )
    shown = text(render(dataclasses.replace(RAN_OUT, processes=ranks)))
    assert (
        """
process  GPU  steps  requested  allocated  reserved  retries
rank 0     0      5   1000 MiB   1001 MiB  1020 MiB        0
rank 1     1      5   1001 MiB   1002 MiB  1021 MiB        0  out of memory
"""
        in shown
    )
    assert "Peak of each step of rank 1" in shown


def test_a_process_on_two_cards_is_one_process() -> None:
    """A process has a row for each device that it used."""
    rows = tuple(dataclasses.replace(PROCESS, device_index=index) for index in range(2))
    assert "1 process, 4.5 s" in text(render(dataclasses.replace(REHEARSAL, processes=rows)))


def test_several_cards_are_one_table() -> None:
    """Each card has what is left of it, or what is missing."""
    shown = text(render_several((REHEARSAL, dataclasses.replace(RAN_OUT, seconds=6.0))))
    rows = [line.split() for line in shown.splitlines() if line.startswith("NVIDIA GeForce")]
    assert rows[0][4:] == ["settled", "5", "1020", "MiB", "1220", "MiB", "10.8", "GiB"]
    assert rows[1][4:] == ["out", "of", "memory", "5", "1020", "MiB", "1220", "MiB", "-500", "MiB"]
    assert shown.count("Rehearsed, not measured") == 1
    assert "2 processes, 10.5 s, torch 2.15.0." in shown


def test_several_cards_tell_the_reads_of_any() -> None:
    """Memory of the first card may have run out before the line that reads."""
    size = dataclasses.replace(READ, kind=ReadKind.SIZE, changes_course=True)
    shown = text(render_several((RAN_OUT, with_read(size), REHEARSAL)))
    assert "Do not trust these figures. train.py:12: sizes were read" in shown


def with_read(read: DeviceRead) -> Rehearsal:
    process = dataclasses.replace(PROCESS, reads=(read,))
    return dataclasses.replace(REHEARSAL, processes=(process,))


def test_doubts_are_plain() -> None:
    """A size makes figures wrong. A decision does so only if it falls otherwise."""
    shown = with_read(READ)
    assert (doubts(shown), shown.is_trusted) == ((), True)
    assert "Lines that read what no kernel computed (1 line, 5 reads)" in text(render(shown))
    size = with_read(dataclasses.replace(READ, kind=ReadKind.SIZE, changes_course=True))
    assert not size.is_trusted
    assert "Do not trust these figures. train.py:12: sizes were read" in text(render(size))
    decision = with_read(dataclasses.replace(READ, kind=ReadKind.DECISION, changes_course=True))
    assert not decision.is_trusted
    told = text(render(decision))
    assert "not trust" not in told
    assert "train.py:12: values were read there to decide what to do next." in told


def test_places_are_short() -> None:
    """They start at a package, or are the file's name."""
    assert short_line("/env/lib/python3.11/site-packages/timm/a.py:3") == "timm/a.py:3"
    assert short_line("/home/user/train.py:12") == "train.py:12"
    assert short_line(None) == "(unknown)"


def test_a_record_is_plain_values() -> None:
    """It also has the values that follow from its fields."""
    plain = RAN_OUT.to_dict()
    assert plain["source"] == "rehearsed"
    assert plain["fits"] is False
    assert plain["is_trusted"] is True
    assert plain["total_bytes"] == 1220 * MIB
    assert plain["peak"]["reserved_bytes"] == 1020 * MIB
    assert plain["processes"][0]["shortages"][0]["missing_bytes"] == 500 * MIB
    assert plain["message"].startswith("CUDA out of memory.")


def test_the_page_of_a_command_that_ran_out_at_once() -> None:
    """It says what torch said, without its link. A table without a step is left out."""
    process = dataclasses.replace(RAN_OUT.processes[0], steps=())
    ran_out = dataclasses.replace(RAN_OUT, processes=(process,))
    assert rehearsal_page._warning(ran_out) == (
        "It does not fit. 500 MiB were missing. CUDA out of memory. Tried to allocate 600.00 MiB."
    )
    assert rehearsal_page._tables(ran_out) == []
    assert [panel.key for panel in rehearsal_page._tables(RAN_OUT)] == ["processes"]
