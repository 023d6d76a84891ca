"""Processes of trials that die, hang or end early, and the server that replaces them."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import threading
import time
from typing import Any

import psutil
import pytest
import torch
from wide import FP32, LIMIT, Wide, wide_step

from memfit import Workload
from memfit.backends.cpu import server
from memfit.backends.cpu.backend import CpuBackend
from memfit.errors import StepCrashedError
from memfit.records import Outcome
from memfit.step.training_step import TrainingStep


def test_the_kernels_kill_is_out_of_memory() -> None:
    """A process that is killed from outside ran out of memory, and the next trial runs."""
    step = wide_step(lambda out: os.kill(os.getpid(), 9 if out.shape[0] > 5 else 0))
    with CpuBackend(memory_bytes=LIMIT) as backend:
        assert backend.trial(step, 9).outcome is Outcome.OUT_OF_MEMORY
        assert backend.trial(step, 3).fits


def test_a_crash_is_an_error_with_its_last_words() -> None:
    """A segmentation fault is the step's own error, and the message says where it was."""
    step = wide_step(lambda out: ctypes.string_at(0))
    died = pytest.raises(StepCrashedError, match="died of SIGSEGV at batch size 2")
    with CpuBackend(memory_bytes=LIMIT) as backend, died as caught:
        backend.trial(step, 2)
    assert "Fatal Python error: Segmentation fault, File" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_exit_that_claims_success_is_an_error_too() -> None:
    """memfit does not wait for a report from a process that has ended."""
    with (
        CpuBackend(memory_bytes=LIMIT) as backend,
        pytest.raises(StepCrashedError, match="exit code 0"),
    ):
        backend.trial(wide_step(lambda out: os._exit(0)), 2)


def test_an_exit_is_an_error_with_its_code() -> None:
    """A step that ends its process did not run out of memory."""
    with (
        CpuBackend(memory_bytes=LIMIT) as backend,
        pytest.raises(StepCrashedError, match="exit code 7"),
    ):
        backend.trial(wide_step(lambda out: os._exit(7)), 2)


def test_a_server_that_dies_while_it_builds_is_replaced() -> None:
    """If converting a model kills its process, the trial ends, and the backend goes on."""

    class Fragile(Wide):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            os._exit(5)

    workload = Workload(Fragile(), torch.ones(1, 1), lambda out: out.mean(), torch.optim.SGD)
    with CpuBackend(memory_bytes=LIMIT) as backend:
        with pytest.raises(StepCrashedError, match="exit code 5"):
            backend.trial(TrainingStep(subject=workload, options=FP32), 2)
        assert backend.trial(wide_step(), 2).fits


def test_leaving_ends_every_process() -> None:
    """No process is left running or unreaped, in any state of a trial."""

    def children() -> set[int]:
        return {child.pid for child in psutil.Process().children(recursive=True)}

    before = children()
    backend = CpuBackend(memory_bytes=LIMIT)
    step = wide_step(lambda out: time.sleep(60) if out.shape[0] > 5 else None)
    backend.trial(step, 2)
    assert children() - before

    def interrupt() -> None:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt), backend:
        backend.trial(step, 6)
    deadline = time.monotonic() + 10
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children() <= before


def test_a_lock_that_another_thread_holds_ends_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork never gets it, so the trial is ended, and the error says where it waits."""
    monkeypatch.setattr(server, "_STALLED_SECONDS", 2.0)
    lock, is_held, may_end = threading.Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            is_held.set()
            may_end.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    is_held.wait()

    def take(out: torch.Tensor) -> None:
        with lock:
            pass

    try:
        with (
            CpuBackend(memory_bytes=LIMIT) as backend,
            pytest.raises(StepCrashedError, match=r"did nothing for 2 s .*in take.* a lock"),
        ):
            backend.trial(wide_step(take), 2)
    finally:
        may_end.set()
        thread.join()


def test_a_process_that_ignores_its_childrens_ends_gets_answers() -> None:
    """Under some supervisors the system throws away how children ended."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with CpuBackend(memory_bytes=LIMIT) as backend:
            step = wide_step(lambda out: os._exit(7) if out.shape[0] > 5 else None)
            assert backend.trial(step, 2).fits
            with pytest.raises(StepCrashedError, match="exit code 7"):
                backend.trial(step, 6)
            assert backend.trial(step, 3).fits
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_trial_killed_after_its_answer_leaves_no_second_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next trial gets its own answer and not the end of the last one."""
    dumps = pickle.dumps

    def killed_afterwards(answer: Any) -> bytes:
        text: bytes = dumps(answer)
        if isinstance(answer, tuple) and answer[1].trial.batch_size == 3:
            # The kill comes between two lines: the report is made, but not sent yet.
            os.kill(os.getpid(), signal.SIGKILL)
        return text

    monkeypatch.setattr(pickle, "dumps", killed_afterwards)
    with CpuBackend(memory_bytes=LIMIT) as backend:
        step = wide_step()
        assert backend.trial(step, 3).outcome is Outcome.OUT_OF_MEMORY
        assert [backend.trial(step, size).batch_size for size in (4, 5, 6)] == [4, 5, 6]


def test_a_trial_killed_before_it_was_asked_for_is_forked_again() -> None:
    """Nobody has waited for it, so no error is reported."""
    with CpuBackend(memory_bytes=LIMIT) as backend:
        step = wide_step()
        assert backend.trial(step, 2).fits
        assert backend._server is not None
        deadline = time.monotonic() + 10
        waiting: list[psutil.Process] = []
        while not waiting and time.monotonic() < deadline:
            waiting = psutil.Process(backend._server._pid).children()
        waiting[0].kill()
        assert [backend.trial(step, size).batch_size for size in (4, 5)] == [4, 5]


def test_a_server_that_is_gone_is_replaced_before_the_next_trial() -> None:
    """If no process took a request, a new process gets it."""
    with CpuBackend(memory_bytes=LIMIT) as backend:
        step = wide_step()
        assert backend.trial(step, 2).fits
        assert backend._server is not None
        psutil.Process(backend._server._pid).kill()
        time.sleep(0.5)
        assert backend.trial(step, 3).fits
