"""Follows a script through its training: steps, phases, peaks, and where memory runs out.

A phase is what the script does between two things that can be seen: a model is called, its backward
begins, an optimizer steps. What lies between an optimizer's step and the next call of a model
(loading data, logging) is one phase, named `data`. A model that is called without gradients makes
the phase `evaluation`.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .history import History
from .internals import Internals, frame_here, run_exit_functions
from .journal import Journal
from .lines import here
from .modules import Modules
from .numbers import replace_zeros
from .peaks import FIGURES, Peaks
from .ranks import replace_object_collectives, stay_alone
from .reads import Reads
from .requests import Requests
from .start import after_import
from .values import Values

__all__ = ["Ended", "Watch"]

_MAX_LINES = 200
_LINE_SECONDS = 1.0
_MAX_SWALLOWED = 3
_MAX_FAILURES = 200
_SETTLED = 1.001
_OTHER_OPTIMIZERS = (("fastai.optimizer", "Optimizer"),)

_Figures = dict[int, dict[str, int]]


class Ended(SystemExit):
    """Ends a script when enough was recorded, as if it had called `sys.exit(0)`."""


class Watch:
    """Watches one process.

    Args:
        torch: The module torch, just imported.
        settings: `folder`, `num_steps`, `is_whole`, `keeps_history`, `keeps_requests`, `lone_rank`
            and `computes`.
    """

    def __init__(self, torch: ModuleType, settings: dict[str, Any]) -> None:
        self._torch = torch
        self._num_steps: int = settings["num_steps"]
        self._is_whole: bool = settings["is_whole"]
        self._lone_rank: tuple[int, int] | None = settings["lone_rank"]
        self._journal = Journal(settings["folder"])
        self._internals = Internals(torch)
        self._peaks = Peaks(torch, self._internals)
        self._reads = Reads(self._guarded)
        self._computes: bool = settings["computes"]
        self._values = Values(torch, self._reads, self._guarded)
        self._modules = Modules(
            torch,
            self._internals,
            begun=self._guarded(self._call_begins),
            ended=self._guarded(self._call_ends),
            entered=self._guarded(self._enters),
        )
        self._history = (
            History(torch, self._internals, self._journal, self._modules)
            if settings["keeps_history"]
            else None
        )
        self._requests = (
            Requests(self._internals, self._journal) if settings["keeps_requests"] else None
        )
        self._lock = threading.RLock()
        self._phase = "setup"
        self._step = 0
        self._step_peaks: _Figures = {}
        self._phase_peaks: dict[str, _Figures] = {}
        self._highest: dict[tuple[int, str], int] = {}
        self._last_rise = 0
        self._num_lines = 0
        self._line_time = 0.0
        self._num_failures = 0
        self._failed_step = 0
        self._last_failure: dict[str, Any] | None = None
        self._num_ends = 0
        self._knows_memory = False
        self._num_faults = 0
        self._is_over = False

    def begin(self) -> None:
        """Begin to watch. This does not initialise CUDA."""
        torch = self._torch
        if torch.version.cuda is None:
            self._journal.write("no_cuda", torch=torch.__version__)
            return
        self._peaks.install()
        self._internals.when_initialised(self._guarded(self._device_is_there))
        # `torch.optim` deletes its attribute `optimizer`, so import the module by its name.
        optimizers = importlib.import_module("torch.optim.optimizer")
        optimizers.register_optimizer_step_pre_hook(self._guarded(self._optimizer_begins))
        optimizers.register_optimizer_step_post_hook(self._guarded(self._optimizer_ends))
        for module, name in _OTHER_OPTIMIZERS:
            after_import(module, functools.partial(self._watch_optimizer, name=name))
        self._modules.begin()
        after_import("torch.distributed.distributed_c10d", self._guarded(self._meet_no_rank))
        atexit.register(self._guarded(self._exits))
        os.register_at_fork(after_in_child=self._forked)
        self._watch_exit()

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that records its own failure, so that the script does not fail."""

        def guarded(*args: Any) -> Any:
            try:
                return function(*args)
            except Exception as error:  # noqa: BLE001 - see above; the report says so
                self._num_faults += 1
                if self._num_faults <= _MAX_FAILURES:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    self._journal.write(
                        "fault",
                        message=f"{type(error).__name__} in {where.name}, line {where.lineno}: "
                        f"{error}",
                    )
                return None

        return guarded

    def _meet_no_rank(self, c10d: ModuleType) -> None:
        replace_object_collectives(c10d)
        if self._lone_rank is not None:
            rank, world_size = self._lone_rank
            stay_alone(c10d, rank=rank, world_size=world_size)

    def _watch_exit(self) -> None:
        original = os._exit

        def _exit(status: int) -> Any:
            self._guarded(self._exits)()
            return original(status)

        _exit.__doc__ = original.__doc__
        os._exit = _exit

    def _watch_optimizer(self, module: ModuleType, *, name: str) -> None:
        """Follow optimizers whose class is not torch's, because torch's hooks do not see them."""
        kind = getattr(module, name)
        step = kind.step

        @functools.wraps(step)
        def watched(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            self._guarded(self._optimizer_begins)(optimizer, args, kwargs)
            result = step(optimizer, *args, **kwargs)
            self._guarded(self._optimizer_ends)(optimizer, args, kwargs)
            return result

        kind.step = watched

    def _forked(self) -> None:
        """Begin a new report in a fork of this process."""
        self._journal.restart()
        self._lock = threading.RLock()
        self._is_over = True

    def _device_is_there(self) -> None:
        torch = self._torch
        self._is_over = False
        is_rehearsed = self._reads.begin()
        if is_rehearsed:
            replace_zeros(torch, self._reads)
            if self._computes:
                self._guarded(self._values.begin)()
        self._journal.write(
            "device",
            is_rehearsed=is_rehearsed,
            process=os.getpid(),
            command=list(sys.orig_argv),
            torch=torch.__version__,
            cuda=torch.version.cuda,
            allocator=torch.cuda.get_allocator_backend(),
            names=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            **self._rank(),
        )
        self._internals.on_out_of_memory(self._guarded(self._runs_out))
        if self._history is not None:
            self._history.begin()
        if self._requests is not None:
            self._requests.begin()

    def _rank(self) -> dict[str, int | None]:
        distributed = self._torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            return {"rank": distributed.get_rank(), "num_ranks": distributed.get_world_size()}
        rank, world = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
        if rank.isdecimal() and world.isdecimal():
            return {"rank": int(rank), "num_ranks": int(world)}
        return {"rank": None, "num_ranks": None}

    def _call_begins(self, root: Any, args: Any) -> None:
        is_training = self._torch.is_grad_enabled()
        self._enter_phase("forward" if is_training else "evaluation")
        if self._history is not None and is_training:
            self._history.forward_begins(root, args)

    def _call_ends(self, _root: Any, output: Any) -> None:
        if self._phase != "forward":
            self._fold()
            return
        for leaf in self._internals.tensors(output):
            if leaf.grad_fn is not None:
                leaf.grad_fn.register_prehook(self._guarded(self._backward_begins))
        if self._history is not None:
            self._history.forward_ends(output)

    def _enters(self, path: str | None) -> None:
        if self._history is not None:
            self._history.entered(path)

    def _backward_begins(self, _gradients: Any) -> None:
        if self._phase == "forward":
            self._enter_phase("backward")

    def _optimizer_begins(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if self._torch.compiler.is_compiling():
            return
        self._enter_phase("optimizer")
        if self._history is not None:
            self._history.optimizer_begins(optimizer)

    def _optimizer_ends(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if self._torch.compiler.is_compiling() or not self._torch.cuda.is_initialized():
            return
        with self._lock:
            self._fold()
            self._step += 1
            self._last_failure = None
            self._reads.step = self._step
            rises = self._rises()
            if rises:
                self._last_rise = self._step
            self._write_step(is_rise=rises, optimizer=type(optimizer).__name__)
            if self._history is not None:
                reserved = max(
                    (figures["reserved_bytes"] for figures in self._step_peaks.values()), default=0
                )
                self._history.step_ends(optimizer, peak_bytes=reserved, number=self._step)
            if self._requests is not None:
                self._requests.step_ends()
            self._step_peaks = {}
            self._phase_peaks = {}
            self._modules.forget()
            self._phase = self._reads.phase = "data"
        if not self._is_whole and self._step - self._last_rise >= self._num_steps:
            self._end()

    def _enter_phase(self, name: str) -> None:
        with self._lock:
            if name != self._phase:
                self._fold()
                self._phase = self._reads.phase = name
            if self._history is not None:
                self._history.phase(name)

    def _fold(self) -> None:
        """Add the peaks since the last call to the current phase."""
        taken = self._peaks.take()
        if not taken:
            return
        if not self._knows_memory:
            self._knows_memory = True
            self._write_memory(next(iter(taken)))
        of_phase = self._phase_peaks.setdefault(self._phase, {})
        for of in (self._step_peaks, of_phase):
            for device, figures in taken.items():
                known = of.setdefault(device, dict(figures))
                for name, value in figures.items():
                    known[name] = max(known[name], value)
        if self._phase == "evaluation" or not self._step:
            self._write_figures("phase", is_rise=self._rises())

    def _write_memory(self, device: int) -> None:
        """Write what this process can have of a device that it has just begun to use."""
        free_bytes, total_bytes = self._torch.cuda.mem_get_info(device)
        self._journal.write(
            "memory",
            free_bytes=free_bytes + self._torch.cuda.memory_reserved(device),
            total_bytes=total_bytes,
        )

    def _rises(self) -> bool:
        rises = False
        for device, figures in self._step_peaks.items():
            for name in FIGURES:
                highest = self._highest.get((device, name), 0)
                self._highest[device, name] = max(highest, figures[name])
                # If batches differ slightly in size, peaks never agree to the byte.
                rises = rises or figures[name] > highest * _SETTLED
        return rises

    def _write_step(self, *, is_rise: bool, optimizer: str) -> None:
        self._write_figures("step", is_rise=is_rise, optimizer=optimizer, **self._rank())

    def _write_figures(self, event: str, *, is_rise: bool, **fields: Any) -> None:
        """Write the step's figures so far. If many are alike, write one line a second."""
        now = time.monotonic()
        is_due = now - self._line_time >= _LINE_SECONDS
        if self._num_lines >= _MAX_LINES and not (is_rise or is_due):
            return
        self._num_lines += 1
        self._line_time = now
        self._journal.write(
            event,
            step=self._step,
            phase=self._phase,
            peaks=self._step_peaks,
            phases=self._phase_peaks,
            reads=self._reads.take(),
            left_out=self._reads.left_out(),
            searches_plans=self._torch.backends.cudnn.benchmark,
            has_modules=self._modules.are_followed,
            **fields,
        )

    def _runs_out(self, device: int, wanted_bytes: int, total_bytes: int, free_bytes: int) -> None:
        """Record where memory ran out. torch calls this before it raises its error."""
        self._num_failures += 1
        place = here(frame_here())
        with self._lock:
            self._fold()
            failure = {
                "device": device,
                "wanted_bytes": wanted_bytes,
                "total_bytes": total_bytes,
                "free_bytes": free_bytes,
                "line": place.script,
                "library_line": place.library,
                "module": self._modules.current
                or self._modules.in_backward
                or self._module_of(place),
                "phase": self._phase,
                "step": self._step + 1,
                "peaks": self._step_peaks,
                "phases": self._phase_peaks,
                "reads": self._reads.take(),
                "left_out": self._reads.left_out(),
                "searches_plans": self._torch.backends.cudnn.benchmark,
                **self._rank(),
            }
            # A library may ask again and again; which request is the last is known in the end.
            self._last_failure = failure if self._num_failures > _MAX_FAILURES else None
            if self._last_failure is None:
                self._journal.write("out_of_memory", **failure)
            self._failed_step = self._step + 1

    def _module_of(self, place: Any) -> str | None:
        """Return the innermost module in the frames, for when modules are not followed."""
        for frame in place.frames:
            this = frame.f_locals.get("self")
            if isinstance(this, self._torch.nn.Module):
                return self._modules.path_of(this)
        return None

    def _end(self) -> None:
        """End the script as `sys.exit(0)` does. If it catches that, end the process at once."""
        self._num_ends += 1
        if self._num_ends == 1:
            self._journal.write("settled", step=self._step)
        if self._num_ends > _MAX_SWALLOWED or threading.current_thread() is not (
            threading.main_thread()
        ):
            run_exit_functions()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        raise Ended(0)

    def _exits(self) -> None:
        """Write the last figures when the process ends."""
        if self._is_over:
            return
        self._is_over = True
        self._reads.end()
        self._values.end()
        if not self._torch.cuda.is_initialized():
            return
        if self._last_failure is not None:
            self._journal.write("out_of_memory", **self._last_failure)
        error = getattr(sys, "last_value", None)
        self._num_lines = 0
        with self._lock:
            self._fold()
            self._write_figures(
                "exit",
                is_rise=True,
                suspects=self._reads.suspects(error),
                **_told(error),
                **self._rank(),
            )
            ran_out = self._failed_step == self._step + 1
            if self._history is not None and (ran_out or not self._step):
                self._history.keep(self._step + 1 if ran_out else 0)
            if self._requests is not None and not ran_out:
                self._requests.keep()


def _told(error: BaseException | None) -> dict[str, Any]:
    """Return the error that ended the script; of a chain, the innermost one about memory."""
    if error is None:
        return {"error": None, "message": None}
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    about_memory = [
        link
        for link in chain
        if type(link).__name__ == "OutOfMemoryError" or "out of memory" in str(link)
    ]
    told = (about_memory or chain)[0]
    return {"error": type(told).__name__, "message": str(told)}
