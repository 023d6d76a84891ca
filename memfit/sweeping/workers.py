"""A pool of processes on this machine. If a worker dies, only the task that it ran has no answer.

The processes are started as commands and not by `multiprocessing`, so that a user's script needs no
`if __name__ == "__main__"`, and so that a worker that the system kills can be replaced.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import gc
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

import psutil

from memfit.memory.collector import collector_paused
from memfit.units import GIB

__all__ = ["LocalPool", "Task", "num_workers_for", "serve"]

_WORKER_BYTES = int(1.1 * GIB)
"""The most memory of a worker. One that took more is replaced when its task is done."""


_TASKS_TO_A_COLLECTION = 8
"""Python's garbage collector takes a tenth of the time if it runs whenever it wants to."""


class Task(Protocol):
    """A question that any process can answer."""

    @property
    def key(self) -> str:
        """A text that is the same for equal tasks, in every process."""

    def run(self) -> Any:
        """Return the answer. If the question has a mistake, the answer says so."""

    def failed(self, reason: str) -> Any:
        """Return the answer if the process that ran the task died."""


_Asked = TypeVar("_Asked", bound=Task)


def num_workers_for(num_tasks: int) -> int:
    """Return how many processes this machine has cores and memory for.

    Args:
        num_tasks: The number of tasks.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    num_cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    room = psutil.virtual_memory().available // _WORKER_BYTES
    return max(1, min(num_cores, room, num_tasks))


class LocalPool:
    """Processes that run tasks.

    Args:
        num_workers: How many run at a time.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._started: list[_Worker] = []
        self._lock = threading.Lock()
        self._is_closed = False

    def run(self, tasks: Sequence[_Asked]) -> Iterator[tuple[_Asked, Any]]:
        """Run tasks, and yield each with its answer as soon as it is known.

        The processes end when the iteration ends, also if it is left early.

        Args:
            tasks: The tasks. They can be pickled.
        """
        threads = concurrent.futures.ThreadPoolExecutor(self._num_workers)
        try:
            asked = {threads.submit(self._answer, task): task for task in tasks}
            for done in concurrent.futures.as_completed(asked):
                yield asked[done], done.result()
        finally:
            with self._lock:
                self._is_closed = True
                for worker in self._started:
                    worker.end()
            threads.shutdown(cancel_futures=True)

    def _answer(self, task: _Asked) -> Any:
        with self._lock:
            if self._is_closed:
                return task.failed("The sweep was interrupted.")
            worker = None if self._idle.empty() else self._idle.get()
            if worker is None:
                worker = _Worker()
                self._started.append(worker)
        answer = worker.ask(task)
        if worker.is_alive:
            self._idle.put(worker)
        return answer


class _Worker:
    """A process that answers one task after another."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # What is importable here is importable there, also for `python script.py`.
        environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from memfit.sweeping.workers import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            # Only the calling process handles Ctrl-C.
            start_new_session=True,
        )
        self.is_alive = True

    def ask(self, task: _Asked) -> Any:
        """Return the answer to a task."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(_packed(task))
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = b""
        if not line:
            self.end()
            return task.failed(_how_it_ended(self._process.wait()))
        answer, goes_on = _unpacked(line)
        if not goes_on:
            self.end()
        return answer

    def end(self) -> None:
        """End the process."""
        self.is_alive = False
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            # Closing writes what is still in the buffer, and the process is gone.
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


def serve() -> None:
    """Answer the tasks that come on standard input, until it ends."""
    import torch

    # What a model prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    for number, line in enumerate(sys.stdin.buffer, start=1):
        with collector_paused():
            answer = _unpacked(line).run()
        if number % _TASKS_TO_A_COLLECTION == 0:
            gc.collect()
        goes_on = psutil.Process().memory_info().rss < _WORKER_BYTES
        answers.write(_packed((answer, goes_on)))
        answers.flush()
        if not goes_on:
            break


def _how_it_ended(code: int) -> str:
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"The process that traced it ended with {how}; it may have run out of memory."


def _packed(value: Any) -> bytes:
    return base64.b64encode(pickle.dumps(value)) + b"\n"


def _unpacked(line: bytes) -> Any:
    return pickle.loads(base64.b64decode(line))  # noqa: S301 - from a process of our own
