"""The process that rehearses: loaded before torch is a device whose kernels do nothing.

It imports torch once and forks a child for each trial, before CUDA is touched, so that every trial
finds a fresh CUDA. A child serves requests until it is told to end. `RehearsedBackend` is the other
side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from memfit.memory.collector import collector_paused

__all__ = ["Answer", "Call", "End", "Open", "main", "serve"]

# A shell's exit code for a process that a signal ended: this, and the number of the signal.
_KILLED = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Fork a child for a card.

    Args:
        environment: Variables that describe the card.
        memory_bytes: A cap on what the allocator may reserve; `None` for what the card has.
        search_path: Where the other side finds modules, so that its steps are found here.
        switches: torch's switches on the other side.
    """

    environment: Mapping[str, str]
    memory_bytes: int | None
    search_path: tuple[str, ...]
    switches: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Call a function with the backend, and a step where there is one.

    Args:
        function: `"package.module:name"`; it is called with the backend first.
        step: A number for the step; the same number is the same step.
        parcel: The step as bytes, where it is new.
        arguments: What else the function takes.
    """

    function: str
    step: int | None = None
    parcel: bytes | None = None
    arguments: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """End the child of a card."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a call returned, or what it raised and where."""

    value: Any = None
    error: BaseException | None = None
    where: str = ""


def main() -> None:
    """Serve in a new Python, until the other side is gone."""
    # What every card needs, imported once.
    # Triton warns whoever compiles of a default of its next release.
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    with collector_paused(for_good=True):
        for name in ("torch", "timm", "memfit.backends.cuda"):
            importlib.import_module(name)
    with contextlib.suppress(EOFError, ConnectionError):
        serve(Connection(int(sys.argv[1])))
    # A normal exit would first clean up torch, which takes seconds.
    os._exit(0)


def serve(connection: Connection) -> None:
    """Serve one card after another, until the other side is gone.

    Raises:
        EOFError: The other side is gone.
        ConnectionError: The same.
    """
    # Ctrl-C is for the process that asked; this one ends with its connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        request = connection.recv()
        assert isinstance(request, Open)
        pid = os.fork()
        if pid == 0:
            _serve(connection, request)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            # The other side waits for an answer. Its connection ends with this process.
            os._exit(code if code > 0 else _KILLED - code)


def _serve(connection: Connection, opening: Open) -> None:
    """Serve one card, in the child, and leave without running the parent's exit code."""
    code = 1
    os.environ.update(opening.environment)
    sys.path[:] = opening.search_path
    # What was imported stays. Each trial runs the collector twice, which would walk through it all.
    gc.freeze()
    # It is about speed, and the trial's DistributedDataParallel is memfit's.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    try:
        _answer_calls(connection, opening)
        code = 0
    except BaseException:  # noqa: BLE001 - it is said before the process leaves
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _answer_calls(connection: Connection, opening: Open) -> None:
    import torch

    from memfit.backends.crossing import portable
    from memfit.backends.cuda import CudaBackend
    from memfit.backends.rehearsed.parcel import unpacked
    from memfit.memory.switches import set_switches

    steps: dict[int, Any] = {}
    set_switches(opening.switches)
    with CudaBackend(torch.device("cuda"), memory_bytes=opening.memory_bytes) as backend:
        while True:
            try:
                request = connection.recv()
            except (EOFError, ConnectionError):
                return
            if isinstance(request, End):
                connection.send(Answer())
                return
            assert isinstance(request, Call)
            try:
                if request.step is not None and request.parcel is not None:
                    steps = {request.step: unpacked(request.parcel)}
                subject = () if request.step is None else (steps[request.step],)
                module, _, name = request.function.partition(":")
                function = getattr(importlib.import_module(module), name)
                answer = Answer(value=function(backend, *subject, *request.arguments))
            except Exception as error:  # noqa: BLE001 - it is raised on the other side
                answer = Answer(error=portable(error), where=traceback.format_exc())
            connection.send(answer)
            del answer  # an error's traceback holds the tensors of the step that failed
