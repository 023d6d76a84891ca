"""Commands on a rehearsed card: what memfit sees of them, and that they do not change."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from memfit.cards import find_gpu
from memfit.errors import UsageError
from memfit.records import Rehearsal, RehearsalEnd, Source
from memfit.rehearsal.activate import rehearsed_environment
from memfit.rehearsal.ranks import LoneRank
from memfit.rehearsal.run import Rehearsed, _notes, rehearse_command
from memfit.units import MIB

SCRIPTS = Path(__file__).parent / "scripts"
TRAINING = str(SCRIPTS / "training.py")
CARD = find_gpu("rtx3060")


@pytest.fixture(autouse=True)
def _own_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Check after every test that no file of a report and no process is left.

    Data loaders make sockets in the temporary folder, and a socket's path has at most 107
    characters: in pytest's own folders, which are deep, a loader would wait forever.
    """
    # Otherwise pytest may make its own folder in the one below, which goes away.
    tmp_path_factory.getbasetemp()
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield
        assert not list(Path(folder).glob("memfit-rehearsal-*"))
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert not left


def rehearse(*words: str, num_steps: int = 3, is_whole: bool = False) -> Rehearsal:
    return recorded(*words, num_steps=num_steps, is_whole=is_whole, keeps_history=False).rehearsal


def recorded(
    *words: str, num_steps: int = 3, is_whole: bool = False, keeps_history: bool = True
) -> Rehearsed:
    return rehearse_command(
        [sys.executable, *words],
        CARD,
        rehearsed_environment(CARD),
        num_steps=num_steps,
        is_whole=is_whole,
        keeps_history=keeps_history,
    )


def printed_peaks(text: str) -> list[int]:
    return [int(line.split()[1]) for line in text.splitlines() if line.startswith("peak ")]


@pytest.mark.rehearses
def test_a_script_ends_when_its_peak_has_settled(capfd: pytest.CaptureFixture[str]) -> None:
    """The script ends as with `sys.exit(0)`. It reads the same peaks as without memfit."""
    found = rehearse(TRAINING, "8", "1000", "reset")
    out, err = capfd.readouterr()
    assert (found.end, found.exit_code, err) == (RehearsalEnd.SETTLED, 0, "")
    assert found.source is Source.REHEARSED
    (process,) = found.processes
    # The optimizer's state is there from the second step on, which is the first at this peak.
    first, second, *others = process.steps
    assert first.peak.allocated_bytes < second.peak.allocated_bytes
    assert all(step.peak == second.peak for step in others)
    assert process.num_steps == 5
    assert [phase.name for phase in process.phases] == [
        "setup",
        "data",
        "forward",
        "backward",
        "optimizer",
    ]
    assert printed_peaks(out) == [first.peak.allocated_bytes, second.peak.allocated_bytes]
    # Two weights of 1 MiB with two moments each and the first's gradient, five batches of 8 MiB
    # (the input, what two layers keep, two gradients), and two counters of steps.
    assert second.peak.requested_bytes == 2 * 3 * MIB + 1 * MIB + 5 * 8 * MIB + 2 * 4


@pytest.mark.rehearses
def test_a_whole_script_shows_its_evaluation() -> None:
    """The script runs to its end, here `os._exit` with a code of its own."""
    found = rehearse(TRAINING, "2", "6", "evaluate", "quit", is_whole=True)
    assert (found.end, found.exit_code) == (RehearsalEnd.FAILED, 5)
    (process,) = found.processes
    assert process.num_steps == 6
    evaluation = process.phase("evaluation")
    assert evaluation is not None
    assert evaluation.peak.requested_bytes >= 2 * 8 * MIB
    assert process.peak.requested_bytes == evaluation.peak.requested_bytes


@pytest.mark.parametrize(
    ("extra", "code"), [("fail", 1), ("crash", -signal.SIGABRT)], ids=["error", "abort"]
)
@pytest.mark.rehearses
def test_a_script_that_fails_keeps_its_code(
    extra: str, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its output does not change, and the report has everything up to the failure."""
    found = rehearse(TRAINING, "2", "2", extra)
    assert (found.end, found.exit_code) == (RehearsalEnd.FAILED, code)
    assert found.processes[0].num_steps == 2
    error = capfd.readouterr().err
    if extra == "fail":
        assert error.endswith("ValueError: a fault of the script's own\n")
        assert found.message == "a fault of the script's own"
    else:
        assert any("SIGABRT" in note for note in found.notes)


@pytest.mark.rehearses
def test_running_out_names_line_module_and_bytes(capfd: pytest.CaptureFixture[str]) -> None:
    """The script ends with torch's own error, and the report says what was missing."""
    found = rehearse(TRAINING, "6000", "2")
    assert (found.end, found.exit_code) == (RehearsalEnd.OUT_OF_MEMORY, 1)
    shortage = found.shortage
    assert shortage is not None
    assert shortage.wanted_bytes == 6000 * MIB
    assert shortage.missing_bytes == shortage.wanted_bytes - shortage.free_bytes > 0
    line = next(
        number
        for number, text in enumerate(Path(TRAINING).read_text("utf-8").splitlines(), start=1)
        if "self.weight).relu()" in text
    )
    assert shortage.line == f"{TRAINING}:{line}"
    assert (shortage.module, shortage.phase, shortage.step) == ("first", "forward", 1)
    assert found.message is not None
    assert found.message.startswith("CUDA out of memory. Tried to allocate")
    assert found.message.splitlines()[0] in capfd.readouterr().err


@pytest.mark.rehearses
def test_a_script_may_handle_a_shortage() -> None:
    """The script catches the error and goes on. The report says that memory ran out."""
    found = rehearse(TRAINING, "5000", "4", "retry", is_whole=True)
    assert (found.end, found.exit_code) == (RehearsalEnd.FINISHED, 0)
    (process,) = found.processes
    assert process.num_steps == 4
    # It is one place with the same request each time.
    (shortage,) = process.shortages
    assert (shortage.num_times, shortage.ended_script) == (4, False)
    assert any(note.startswith("4 requests for memory failed") for note in found.notes)
    once = dataclasses.replace(shortage, num_times=1)
    (note,) = _notes((), [dataclasses.replace(process, shortages=(once,))], 0, None)
    assert note.startswith("1 request for memory failed")


@pytest.mark.rehearses
def test_reads_that_decide_are_told_from_reads_that_show() -> None:
    """A mask as an index and a condition decide what runs. A printed loss does not."""
    found = rehearse(TRAINING, "2", "3", "read", is_whole=True)
    text = Path(TRAINING).read_text("utf-8").splitlines()
    reads = {
        (text[int((read.line or "").rpartition(":")[2]) - 1].strip(), read.kind.value): (
            read.num_reads,
            read.changes_course,
        )
        for read in found.processes[0].reads
    }
    assert reads == {
        ('print("loss", loss.item(), loss)', "number"): (3, False),
        ('print("loss", loss.item(), loss)', "tensor"): (6, False),
        ("if loss.item() > 1:", "number"): (3, True),
        ("x[x > 3].sum()", "size"): (3, True),
    }
    assert not found.is_trusted


@pytest.mark.rehearses
def test_a_script_may_divide_by_what_no_kernel_computed() -> None:
    """A number with a fraction is not zero. A count is, and the report names its line."""
    found = rehearse(TRAINING, "2", "2", "divide")
    assert found.message == "division by zero"
    (note,) = found.notes
    text = Path(TRAINING).read_text("utf-8").splitlines()
    number = text.index("        count = (x > 3).sum().item()") + 1
    assert f"{TRAINING}:{number}. A value read there is zero" in note


@pytest.mark.rehearses
def test_what_the_host_knows_is_computed_there(capfd: pytest.CaptureFixture[str]) -> None:
    """Masks, lengths and flags are right. What follows from noise is counted as unknown."""
    script = SCRIPTS / "values.py"
    found = rehearse(str(script))
    out, err = capfd.readouterr()
    assert out.splitlines() == [
        "False True 3",
        "[1, 2] torch.Size([5]) True",
        "[[0, 0, 0]]",
        "[0.5, 0.5] 1",
        "True False False",
        "True False False",
        "0",
        "1.1015625 tensor(2.)",
        "out of memory",
    ], err
    text = script.read_text("utf-8").splitlines()
    reads = [
        (text[int(read.line.rpartition(":")[2]) - 1].strip(), read.num_reads)
        for read in found.processes[0].reads
        if read.line is not None
    ]
    assert sorted(reads) == [
        ("print((noise | done).all().item(), (noise & ~done).any().item(), noise.any().item())", 1),
        ("print(bool(torch.isfinite(loss)), bool(torch.isnan(loss)), bool(torch.isinf(loss)))", 2),
        ("print(mask.max().item())", 1),
    ]
    assert not [note for note in found.notes if "failed to watch" in note]


@pytest.mark.rehearses
def test_values_can_be_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    """Then they read as zeros."""
    words = [sys.executable, str(SCRIPTS / "values.py")]
    rehearse_command(words, CARD, rehearsed_environment(CARD), computes=False)
    assert capfd.readouterr().out.splitlines()[0] == "False False 0"


@pytest.mark.rehearses
def test_every_process_is_reported_and_none_is_left(capfd: pytest.CaptureFixture[str]) -> None:
    """Some are spawned and some forked, with data loaders, and they print much."""
    found = rehearse(str(SCRIPTS / "processes.py"))
    out = capfd.readouterr().out
    assert (found.end, found.exit_code) == (RehearsalEnd.SETTLED, 0)
    held = sorted(process.peak.requested_bytes // MIB for process in found.processes)
    # Each has a weight and its gradient.
    assert held == [32, 64, 128]
    assert any("3 processes used GPU 0, and each rehearsed a card" in note for note in found.notes)
    assert "batch [0, 1, 2, 3]" in out
    assert "joined 0" in out
    assert len(out) > 100 * MIB


@pytest.mark.rehearses
def test_a_rank_is_alone_and_every_rank_has_its_objects(capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 3 of 4 waits for no other. Objects and flags are as if all ranks had its own."""
    rank = LoneRank(rank=3, world_size=4)
    words = [sys.executable, str(SCRIPTS / "lone_rank.py")]
    variables = rehearsed_environment(CARD, num_gpus=rank.gpus_of_node)
    found = rehearse_command(words, CARD, variables, lone_rank=rank).rehearsal
    out, err = capfd.readouterr()
    assert (found.end, out) == (
        RehearsalEnd.FINISHED,
        "True [None, None, None, None] ['settings', 3] [30] 4\n",
    ), err
    (process,) = found.processes
    assert process.rank == 3
    assert [note.partition(":")[2] for note in found.notes] == [
        " the states of dropout between recurrent layers."
    ]


@pytest.mark.rehearses
def test_what_a_command_leaves_running_is_ended() -> None:
    """Processes in a session of their own are ended too."""
    found = rehearse(TRAINING, "2", "1", "orphan")
    assert found.exit_code == 0
    running = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    # No other test waits this long.
    assert ["sleep", "612.5"] not in running


@pytest.mark.rehearses
def test_an_interrupt_ends_it_and_the_report_is_written() -> None:
    """The command gets the interrupt too. The report has everything up to it."""
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "memfit", "rehearse", "--gpu", "rtx3060", "--whole", "--"),
            *(sys.executable, TRAINING, "2", "1000000", "wait"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line == "stepped\n":
            break
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert "The command was interrupted after " in out


@pytest.mark.rehearses
@pytest.mark.parametrize("extras", [[], ["save"]])
def test_a_signal_that_ends_memfit_ends_the_command_and_starts_no_other(extras: list[str]) -> None:
    """It is memfit that was ended, also if the command then ends as if all were well."""
    cards = ("--gpu", "rtx3060", "--gpu", "rtx4090")
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "memfit", "rehearse", *cards, "--whole", "--"),
            *(sys.executable, TRAINING, "2", "1000000", "wait", *extras),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line == "stepped\n":
            break
    (command,) = psutil.Process(child.pid).children()
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 143, err
    assert "memfit was told to end after " in out
    assert "RTX 3060" in out
    assert "RTX 4090" not in out
    assert not command.is_running()


@pytest.mark.rehearses
def test_without_a_cache_there_are_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch counts nothing then. The card was used all the same, and memory runs out."""
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    fits, ran_out = rehearse(TRAINING, "2", "2"), rehearse(TRAINING, "20000", "2")
    assert (fits.end, ran_out.end) == (RehearsalEnd.FINISHED, RehearsalEnd.OUT_OF_MEMORY)
    for found in (fits, ran_out):
        (note,) = found.notes
        assert note.startswith("PYTORCH_NO_CUDA_MEMORY_CACHING is set.")


@pytest.mark.rehearses
def test_a_history_has_the_roles_of_a_step() -> None:
    """Parameters, gradients, state and activations are distinguished; modules are named."""
    from memfit.profiling.rehearsed import recorded_step
    from memfit.records import Role

    found = recorded(TRAINING, "8", "1000")
    step = recorded_step(found)
    assert step.number == found.rehearsal.processes[0].num_steps
    roles = {share.role: share.num_bytes for share in step.peak.roles}
    assert roles[Role.PARAMETERS] == 2 * MIB
    assert roles[Role.OPTIMIZER_STATE] >= 4 * MIB
    assert roles[Role.INPUTS] == 8 * MIB
    # This is the first layer's result, and the losses of two steps. The second layer's is freed.
    assert roles[Role.ACTIVATIONS] == 8 * MIB + 2 * 4
    assert step.peak.phase == "backward"
    assert {"first", "second"} <= {share.module for share in step.peak.modules}
    assert step.peak.total_bytes == found.rehearsal.total_bytes


@pytest.mark.rehearses
def test_what_a_script_keeps_is_told_from_workspaces() -> None:
    """An average of the weights, autocast's copies, and what the step before has left behind."""
    from memfit.profiling.rehearsed import recorded_step
    from memfit.records import Role

    step = recorded_step(recorded(str(SCRIPTS / "roles.py")))
    blocks = [
        (block.role, block.born is None, block.requested_bytes // MIB)
        for block in step.blocks
        if block.requested_bytes >= MIB
    ]
    # torch before 2.15 keeps cuBLAS's workspaces from step to step.
    before = [(role, size) for role, is_before, size in blocks if is_before]
    assert sorted(one for one in before if one[0] is not Role.WORKSPACES) == [
        (Role.ACTIVATIONS, 4),
        (Role.BUFFERS, 4),
        (Role.GRADIENTS, 4),
        (Role.INPUTS, 8),
        (Role.PARAMETERS, 4),
    ]
    during = [(role, size) for role, is_before, size in blocks if not is_before]
    assert (Role.AUTOCAST_COPIES, 2) in during
    assert not [role for role, _ in during if role in (Role.BUFFERS, Role.WORKSPACES)]


@pytest.mark.rehearses
def test_a_command_without_the_card_is_said_so() -> None:
    """The command runs normally, and the report says that it did not use the card."""
    found = rehearse("-c", "print('hello')")
    assert (found.end, found.processes, found.peak) == (RehearsalEnd.FINISHED, (), None)
    assert any("No process of the command is known to have used" in note for note in found.notes)


def test_commands_that_are_none_are_refused(tmp_path: Path) -> None:
    """The message says what to write instead."""
    script = tmp_path / "train.py"
    script.touch()
    with pytest.raises(UsageError, match=r"Write -- python .*train\.py"):
        rehearse_command([str(script)], CARD, {})
    with pytest.raises(UsageError, match="There is no command 'pyhton' here"):
        rehearse_command(["pyhton", "train.py"], CARD, {})
    with pytest.raises(UsageError, match="after --"):
        rehearse_command([], CARD, {})


def test_the_watch_is_not_seen_by_a_script(tmp_path: Path) -> None:
    """The import path is unchanged, and the user's own `sitecustomize` runs."""
    import json

    from memfit.rehearsal.run import _watched

    (tmp_path / "sitecustomize.py").write_text("import sys; sys.own = __file__\n", "utf-8")
    program = "import sys; print(sys.path, sys.own, sys.modules['sitecustomize'].__file__)"
    plain = {**os.environ, "PYTHONPATH": str(tmp_path)}
    settings = {
        "folder": str(tmp_path),
        "num_steps": 3,
        "is_whole": False,
        "keeps_history": False,
        "keeps_requests": False,
        "lone_rank": None,
        "computes": True,
    }
    watched = _watched(plain, settings)
    assert json.loads(watched["MEMFIT_REHEARSAL_WATCH"]) == settings
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
        ).stdout
        for env in (plain, watched)
    ]
    assert outputs[0] == outputs[1]
