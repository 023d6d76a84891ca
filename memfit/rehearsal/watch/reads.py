"""Records when the host reads from the device. Values that a kernel should compute are zeros.

The device calls a function for every read. The Python frames show which line reads. The C++
functions of torch on the stack show what is read: a number, the number of true entries of a mask,
or a whole tensor.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from .internals import frame_here
from .lines import Place, here

__all__ = ["Reads"]

_MAX_PLACES = 500
_MAX_DEPTH = 80
_MAX_SUSPECTS = 3
_NOT_OF_VALUES = (AttributeError, ImportError, NameError, OSError, SyntaxError, TypeError)
# Parts of the mangled names of functions on the stack, and the kind of read that each one shows.
# The first match counts, because a size is also read through a copy.
_KINDS = (
    ("is_nonzero", "decision"),
    ("nonzero", "size"),
    ("masked_select", "size"),
    ("unique", "size"),
    ("repeat_interleave", "size"),
    ("bincount", "size"),
    ("histc", "size"),
    ("at11cuda_equal", "decision"),
    ("cuda_equal", "decision"),
    ("allclose", "decision"),
    ("local_scalar_dense", "number"),
    ("copy_", "tensor"),
)


class _SymbolInfo(ctypes.Structure):
    """`Dl_info` of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


class Reads:
    """The reads of a process, by line.

    Args:
        guarded: A function that wraps another function so that it never raises.
    """

    def __init__(self, guarded: Callable[[Any], Any]) -> None:
        self._guarded = guarded
        self._library = ctypes.CDLL(None)
        self._callback: Any = None
        self._counts: dict[tuple[str | int | None, ...], dict[str, Any]] = {}
        self._is_inside = False
        self._latest: dict[str, None] = {}
        self._step = 0
        self.phase = "setup"
        self.num_of_script = 0
        """How often the script, and not torch itself, has read what no kernel computed."""

    @property
    def step(self) -> int:
        """The number of optimizer steps so far."""
        return self._step

    @step.setter
    def step(self, number: int) -> None:
        self._step = number
        self._latest.clear()

    def begin(self) -> bool:
        """Let the device report every read. Return false if there is no rehearsed device."""
        register = getattr(self._library, "memfit_rehearsal_on_read", None)
        if register is None:
            return False
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_size_t, ctypes.c_int)(
            self._guarded(self._saw)
        )
        register(self._callback)
        return True

    def left_out(self) -> int:
        """Return which of cuDNN's buffers were used and not counted, as bits (`libraries.h`)."""
        bits = getattr(self._library, "memfit_rehearsal_left_out", None)
        return 0 if bits is None else int(bits())

    def end(self) -> None:
        """Stop the reports of the device."""
        register = getattr(self._library, "memfit_rehearsal_on_read", None)
        if register is not None and self._callback is not None:
            register(None)

    @contextlib.contextmanager
    def muted(self, is_muted: bool) -> Iterator[None]:
        """Do not count the reads inside, if so wanted."""
        before = self._is_inside
        self._is_inside = before or is_muted
        try:
            yield
        finally:
            self._is_inside = before

    def suspects(self, error: BaseException | None) -> list[str]:
        """Return the lines whose reads may have led to an error, the latest last.

        Args:
            error: The error that ended the script.

        Returns:
            If the error went through a line that read, only such lines. Otherwise the latest lines
            that read since the last optimizer step; none for an error that no value leads to.
        """
        if error is None or isinstance(error, _NOT_OF_VALUES):
            return []
        passed = {
            f"{frame.f_code.co_filename}:{line}"
            for frame, line in traceback.walk_tb(error.__traceback__)
        }
        blamed = [line for line in self._latest if line in passed]
        return blamed or list(self._latest)[-_MAX_SUSPECTS:]

    def take(self) -> list[dict[str, Any]]:
        """Return each place that read since the last call, with its counts from the beginning."""
        changed = [count for count in self._counts.values() if count["is_new"]]
        for count in changed:
            count["is_new"] = False
        return [
            {name: value for name, value in count.items() if name != "is_new"} for count in changed
        ]

    def _saw(self, num_bytes: int, is_known: int) -> None:
        # The host wrote these bytes itself, so it reads the true values.
        if is_known or self._is_inside or sys.is_finalizing():
            return
        self._is_inside = True
        try:
            place = here(frame_here())
            # One line can read a truth value and a size. They are other instructions.
            key = (place.script, place.library, place.innermost, place.instruction)
            if not place.is_printing:
                self._take_note(place)
            count = self._counts.get(key)
            if count is None:
                if len(self._counts) >= _MAX_PLACES:
                    return
                count = self._counts[key] = self._first(place)
            if count["phase"] == "setup":
                count["phase"] = self.phase
            count["num_reads"] += 1
            count["num_bytes"] += num_bytes
            count["is_new"] = True
        finally:
            self._is_inside = False

    def _take_note(self, place: Place) -> None:
        self.num_of_script += place.innermost in (place.library, place.script)
        line = place.library or place.script
        if line is not None:
            self._latest.pop(line, None)
            self._latest[line] = None

    def _first(self, place: Place) -> dict[str, Any]:
        # What is printed only is read in many ways, and none of them decides anything.
        is_printing = place.is_printing
        return {
            "line": place.script,
            "library_line": place.library,
            "innermost_line": place.innermost,
            "instruction": place.instruction,
            "spots": [] if is_printing else place.spots(),
            "kind": "tensor" if is_printing else self._kind(),
            "phase": self.phase,
            "step": self.step,
            "num_reads": 0,
            "num_bytes": 0,
            "is_new": True,
        }

    def _kind(self) -> str:
        with contextlib.suppress(AttributeError, OSError):
            text = "\n".join(self._functions())
            return next((kind for part, kind in _KINDS if part in text), "tensor")
        return "tensor"

    def _functions(self) -> Iterator[str]:
        """Yield the mangled names of the functions on this thread's stack."""
        addresses = (ctypes.c_void_p * _MAX_DEPTH)()
        info = _SymbolInfo()
        for address in addresses[: self._library.backtrace(addresses, _MAX_DEPTH)]:
            if self._library.dladdr(ctypes.c_void_p(address), ctypes.byref(info)) and info.name:
                yield info.name.decode(errors="replace")
