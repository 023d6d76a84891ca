"""Trials on the CPU, with real steps, real limits and processes that really die."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn
from wide import FP32, LIMIT, wide_step

from memfit import Workload
from memfit.backends import open_backend
from memfit.backends.cpu import backend as cpu
from memfit.backends.cpu import limits, machine, trials
from memfit.backends.cpu.backend import CpuBackend
from memfit.errors import StepCrashedError, UnsupportedError, UsageError, WorkloadError
from memfit.records import Outcome, Precision, StepOptions
from memfit.step.training_step import TrainingStep
from memfit.units import MIB


def test_a_step_fits_or_runs_out_by_its_bytes() -> None:
    """The reserved bytes grow with the batch, and the limit is where it stops."""
    step = wide_step()
    with CpuBackend(memory_bytes=LIMIT) as backend:
        small, large, over = (backend.trial(step, n) for n in (10, 40, 400))
    assert small.fits
    assert large.fits
    assert over.outcome is Outcome.OUT_OF_MEMORY
    assert over.message is not None
    assert "can't allocate memory" in over.message
    assert over.peak_reserved_bytes is not None
    assert over.peak_reserved_bytes <= LIMIT
    assert small.peak_reserved_bytes is not None
    assert large.peak_reserved_bytes is not None
    per_sample = (large.peak_reserved_bytes - small.peak_reserved_bytes) / 30
    assert per_sample == pytest.approx(round(per_sample / MIB) * MIB, rel=0.1)
    assert large.peak_allocated_bytes == pytest.approx(large.peak_reserved_bytes, rel=0.5)
    assert large.step_seconds is not None
    assert large.left_behind_bytes == 0


def test_the_limit_holds_whatever_this_process_has_freed() -> None:
    """At the limit glibc serves a thread from the arena of another thread."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    blocks: list[int] = []

    def make_a_hole() -> None:
        blocks.extend(libc.malloc(50_000) for _ in range(1000))
        for block in blocks[:-1]:
            libc.free(block)

    thread = threading.Thread(target=make_a_hole)
    thread.start()
    thread.join()
    try:
        with CpuBackend(memory_bytes=30 * MIB) as backend:
            assert not backend.trial(wide_step(), 21).fits
    finally:
        libc.free(blocks[-1])


def test_trials_repeat() -> None:
    """Trials are forked from the same state, whatever ran before; other threads may still race."""
    step = TrainingStep(
        subject="resnet10t",
        options=StepOptions(precision=Precision.FP32, optimizer="momentum", image_size=(64, 64)),
    )
    with CpuBackend(memory_bytes=LIMIT) as backend:
        peaks = [backend.trial(step, size).peak_reserved_bytes for size in (8, 3, 8, 8)]
    alike = [peak or 0 for peak in (peaks[0], *peaks[2:])]
    assert max(alike) - min(alike) <= MIB // 2


def test_the_users_own_objects_are_never_touched(workload: Workload) -> None:
    """Trials run on a copy of the process."""
    before = [tensor.clone() for tensor in workload.model.state_dict().values()]
    state = torch.get_rng_state()
    with CpuBackend(memory_bytes=LIMIT) as backend:
        assert backend.trial(TrainingStep(subject=workload, options=FP32), 4).fits
    after = workload.model.state_dict().values()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_a_users_error_comes_as_it_was_raised() -> None:
    """It has its type, its message and the place in the child."""

    def typo(out: torch.Tensor) -> None:
        raise KeyError("labels")

    with (
        CpuBackend(memory_bytes=LIMIT) as backend,
        pytest.raises(KeyError, match="labels") as caught,
    ):
        backend.trial(wide_step(typo), 2)
    assert "def typo" not in str(caught.value.__cause__)
    assert "in typo" in str(caught.value.__cause__)


def test_an_error_that_cannot_travel_still_says_what_it_was() -> None:
    """An exception that cannot be pickled keeps the name of its type and its message."""

    def odd(out: torch.Tensor) -> None:
        class OddError(Exception):
            pass

        raise OddError("very odd")

    with (
        CpuBackend(memory_bytes=LIMIT) as backend,
        pytest.raises(StepCrashedError, match="OddError: very odd"),
    ):
        backend.trial(wide_step(odd), 2)


def test_a_crash_that_goes_away_with_more_room_was_memory() -> None:
    """A library that does not check its allocations crashes and reports no error."""
    step = wide_step(lambda out: os._exit(1) if data_left() < 130 * MIB else None)
    with CpuBackend(memory_bytes=LIMIT) as backend:
        trial = backend.trial(step, 80)
    assert trial.outcome is Outcome.OUT_OF_MEMORY
    assert trial.message is not None
    assert "exit code 1" in trial.message


def test_last_words_about_memory_are_out_of_memory() -> None:
    """C++ code that gets no memory aborts with these words."""

    def abort(out: torch.Tensor) -> None:
        os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
        os.abort()

    with CpuBackend(memory_bytes=LIMIT) as backend:
        trial = backend.trial(wide_step(abort), 2)
    assert trial.outcome is Outcome.OUT_OF_MEMORY


def data_left() -> int:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    return limit - limits.Footprint.now().data_bytes if limit >= 0 else sys.maxsize


def test_a_suspect_that_goes_away_with_more_room_was_memory() -> None:
    """oneDNN's words count as memory if the same step runs without the limit."""

    def primitive(out: torch.Tensor) -> None:
        if data_left() < 130 * MIB:
            raise RuntimeError("could not create a primitive")

    step = wide_step(primitive)
    with CpuBackend(memory_bytes=LIMIT) as backend:
        assert backend.trial(step, 2).fits
        assert backend.trial(step, 80).outcome is Outcome.OUT_OF_MEMORY
        assert backend._confirmed == {"could not create a primitive"}
        assert backend.trial(step, 81).outcome is Outcome.OUT_OF_MEMORY


@pytest.mark.parametrize("is_full", [True, False])
def test_where_there_is_no_more_room_half_the_batch_decides(
    monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    """It was memory if the limit was nearly reached and half of the batch runs."""
    monkeypatch.setattr(cpu, "_room_bytes", lambda: LIMIT)

    def primitive(out: torch.Tensor) -> None:
        if out.shape[0] > 80:
            kept = torch.ones(80 * MIB // 4) if is_full else None
            del kept
            raise RuntimeError("could not execute a primitive")

    with CpuBackend(memory_bytes=LIMIT) as backend:
        if is_full:
            assert not backend.trial(wide_step(primitive), 90).fits
        else:
            with pytest.raises(RuntimeError, match="primitive"):
                backend.trial(wide_step(primitive), 90)


def test_a_suspect_that_stays_with_more_room_is_the_users_error() -> None:
    """Another limit of a library in the same words is raised, and the search ends."""

    def limit(out: torch.Tensor) -> None:
        if out.shape[0] > 5:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")

    step = wide_step(limit)
    with CpuBackend(memory_bytes=LIMIT) as backend:
        assert backend.trial(step, 5).fits
        with pytest.raises(RuntimeError, match="NOT_SUPPORTED"):
            backend.trial(step, 6)


def test_a_real_convolution_runs_out_whatever_its_library_says() -> None:
    """oneDNN's real failures are outcomes too."""
    options = StepOptions(precision=Precision.FP32, optimizer="momentum", image_size=(96, 96))
    step = TrainingStep(subject="resnet10t", options=options)
    with CpuBackend(memory_bytes=LIMIT) as backend:
        outcomes = [backend.trial(step, n).outcome for n in (4, 64, 128)]
    assert outcomes == [Outcome.FITS, *[Outcome.OUT_OF_MEMORY] * 2]


def test_a_model_that_cannot_be_built_says_so_at_every_trial() -> None:
    """The server answers with the error from building it."""
    step = TrainingStep(
        subject="resnet10t",
        options=StepOptions(precision=Precision.FP32, model_kwargs=(("foo", 1),)),
    )
    with CpuBackend(memory_bytes=LIMIT) as backend:
        for _ in range(2):
            with pytest.raises(UsageError, match="foo=1"):
                backend.trial(step, 2)


def test_a_step_that_has_no_scalar_loss_says_so() -> None:
    """memfit's own errors come from the child too."""
    workload = Workload(nn.Linear(2, 2), torch.ones(2, 2), lambda out: out, torch.optim.SGD)
    with CpuBackend(memory_bytes=LIMIT) as backend, pytest.raises(WorkloadError, match="shape"):
        backend.trial(TrainingStep(subject=workload, options=FP32), 2)


def test_what_a_step_prints_stays_out_of_the_way(capfd: pytest.CaptureFixture[str]) -> None:
    """A model that prints does not break the output of `--json`."""
    with CpuBackend(memory_bytes=LIMIT) as backend:
        assert backend.trial(wide_step(lambda out: print("noise", out.shape)), 2).fits  # noqa: T201
    assert capfd.readouterr().out == ""


def test_steps_run_in_a_process_that_has_used_its_thread_pool() -> None:
    """OpenMP's pool does not survive a fork, and the trial does not wait for it."""
    torch.set_num_threads(2)
    torch.ones(2**22).add_(1)
    with CpuBackend(memory_bytes=LIMIT) as backend:
        assert backend.trial(wide_step(), 40).fits
    torch.ones(2**22).add_(1)
    torch.set_num_threads(1)


def test_steps_run_with_more_threads_than_cores() -> None:
    """Several threads ask at once for the pool that torch makes anew after a fork."""
    options = StepOptions(precision=Precision.FP32, optimizer="adamw", image_size=(96, 96))
    step = TrainingStep(subject="test_vit.r160_in1k", options=options)
    torch.set_num_threads(8)
    try:
        with CpuBackend(memory_bytes=200 * MIB) as backend:
            assert all(backend.trial(step, 60).fits for _ in range(3))
    finally:
        torch.set_num_threads(1)


def test_the_default_limit_is_what_the_machine_leaves() -> None:
    """The headroom is subtracted, and the limit says where it comes from."""
    available = psutil.virtual_memory().available
    capacity = CpuBackend(headroom=0.5).capacity()
    assert 0 < capacity.usable_bytes <= 0.55 * available
    assert "less 50%" in capacity.origin


def test_a_limit_beyond_the_machine_is_refused() -> None:
    """Such a trial would measure swap, or how long the kernel waits before it kills."""
    with pytest.raises(UsageError, match="more than this machine has left"):
        CpuBackend(memory_bytes=2**50)


def test_needed_bytes_are_measured_where_there_is_room() -> None:
    """A step that did not fit is tried again with all the memory of the machine."""
    with CpuBackend(memory_bytes=60 * MIB) as backend:
        step = wide_step()
        assert not backend.trial(step, 100).fits
        needed = backend.needed_bytes(step, 100)
    assert needed is not None
    assert needed > 100 * MIB


def test_a_system_without_limits_gets_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """If mapping beyond the limit succeeds, trials would show nothing."""
    monkeypatch.setattr(limits, "limit_data", lambda num_bytes: None)
    with pytest.raises(UnsupportedError, match="this kernel ignores it"):
        CpuBackend(memory_bytes=LIMIT)
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UnsupportedError, match="this is darwin"):
        open_backend("cpu", memory_bytes=LIMIT)


def test_the_engine_that_cannot_fork_is_explained() -> None:
    """PyTorch's own message about fork becomes advice."""
    error = RuntimeError(
        "Unable to handle autograd's threading in combination with fork-based multiprocessing."
    )
    assert isinstance(trials._explained(error), UnsupportedError)
    other = RuntimeError("other")
    assert trials._explained(other) is other


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_control_groups_of_both_versions_are_read(tmp_path: Path) -> None:
    """Each level with a limit counts, droppable file pages do not, and `max` is no limit."""
    membership = tmp_path / "cgroup"
    membership.write_text("4:cpu:/x\n3:memory:/job\n0::/a/b\n")
    write(tmp_path / "a/b", memory__max="max", memory__current="5", memory__stat="inactive_file 1")
    write(tmp_path / "a", memory__max="100", memory__current="50", memory__stat="inactive_file 20")
    write(
        tmp_path / "memory/job",
        memory__limit_in_bytes="300",
        memory__usage_in_bytes="70",
        memory__stat="cache 9\ntotal_inactive_file 30\n",
    )
    assert machine._control_groups(tmp_path, membership) == [(300, 40), (100, 30)]
    assert machine._control_groups(tmp_path, tmp_path / "none") == []


def test_the_tightest_limit_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """For this process, a container's limit is the limit of the machine."""
    monkeypatch.setattr(machine, "_control_groups", lambda: [(1000, 400), (2**60, 0)])
    assert machine.memory_left() == (600, "memory left in this control group")


def test_the_backend_is_chosen_by_the_device() -> None:
    """`cpu` gets the CPU's backend, and so does no device where there is no GPU."""
    with open_backend("cpu", memory_bytes=LIMIT) as backend:
        assert isinstance(backend, CpuBackend)
        assert backend.device_name.startswith("CPU (")
        assert backend.auto_precision is Precision.FP32
