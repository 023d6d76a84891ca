"""The caching allocator in C, which replays a step a hundred times as fast as the one in Python.

It knows the allocator's default settings. For other settings, and where there is neither a compiled
library nor a compiler, `new_allocator` returns the one in Python. Both give the same figures.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import platform
import sys
import weakref
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from memfit.errors import UnsupportedError
from memfit.records import Action, Event
from memfit.simulation.allocator.caching import (
    AllocatorOutOfMemoryError,
    AllocatorStats,
    CachingAllocator,
)
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.user_cache import compile_into_cache, compiler, run_compiler

__all__ = [
    "LIBRARY",
    "CompiledAllocator",
    "EventTable",
    "carried_folder",
    "compile_library",
    "new_allocator",
    "opened",
]

LIBRARY = "libmemfit_replay.so"
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("replay.c", "addresses.h", "live.h"))
_CARRIED = Path(__file__).with_name("lib")
# Without contraction, products and sums are rounded as Python rounds them.
_COMPILING = ("-std=gnu11", "-O2", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-shared")
_CODES: Final = {
    Action.ALLOC: 0,
    Action.FREE_COMPLETED: 1,
    Action.TRY_ALLOC: 2,
    Action.ALLOC_IF_ROOM: 3,
    Action.EMPTY_CACHE: 4,
    # A phase that begins runs kernels.
    Action.USER_DEFINED: 6,
}
# By identity: the hash of an enumeration's member is computed in Python.
_CODES_BY_ID: Final = {id(action): code for action, code in _CODES.items()}
_ROOM: Final = _CODES[Action.ALLOC_IF_ROOM]
_CHANGEABLE_PLAN: Final = 5
_ENDED, _OUT_OF_MEMORY, _PLAN_FINDS_NO_ROOM = range(3)
_NO_NEED: Final = -1
_NO_CODE: Final = -1

_log = logging.getLogger(__name__)


class _Program(ctypes.Structure):
    """`Program` in replay.c."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("bytes", ctypes.c_void_p),
        ("growth", ctypes.c_void_p),
        ("needs", ctypes.c_void_p),
    )


class EventTable:
    """A stretch of events in the form that the compiled allocator reads.

    Args:
        lines: For each event, its action, its id, its bytes, what each further sample adds, and
            the event itself.
        needs: The number of the need that says an event's bytes, by the event's position.
    """

    def __init__(
        self, lines: Sequence[tuple[Action, int, int, float, Event]], needs: dict[int, int]
    ) -> None:
        codes = [_CODES_BY_ID.get(id(line[0]), _NO_CODE) for line in lines]
        for at in needs:
            if codes[at] == _ROOM:
                codes[at] = _CHANGEABLE_PLAN
        needed = [_NO_NEED] * len(lines)
        for at, need in needs.items():
            needed[at] = need
        # Actions on segments change nothing.
        self.positions = [at for at, code in enumerate(codes) if code != _NO_CODE]
        told = [lines[at] for at in self.positions]
        self._lists = (
            array("b", [codes[at] for at in self.positions]),
            array("q", [line[1] for line in told]),
            array("q", [line[2] for line in told]),
            array("d", [line[3] for line in told]),
            array("i", [needed[at] for at in self.positions]),
        )
        self.program = _Program(len(told), *(found.buffer_info()[0] for found in self._lists))


class CompiledAllocator:
    """The allocator of one device and one stream; see `CachingAllocator`.

    Args:
        library: The compiled library.
        capacity_bytes: Bytes that can be taken from the device; `None` for no limit.
        settings: The allocator's options. Only the size of large segments and the order of blocks
            count here.
    """

    def __init__(
        self, library: ctypes.CDLL, *, capacity_bytes: int | None, settings: AllocatorSettings
    ) -> None:
        self._library = library
        self._capacity_bytes = capacity_bytes
        self._handle = library.memfit_allocator_new(
            -1 if capacity_bytes is None else capacity_bytes,
            settings.large_segment_bytes,
            settings.block_order,
        )
        if not self._handle:
            raise MemoryError
        weakref.finalize(self, library.memfit_allocator_delete, self._handle)

    @property
    def stats(self) -> AllocatorStats:
        """The current and peak bytes."""
        figures = self._figures()
        return AllocatorStats(
            requested_bytes=figures[0],
            allocated_bytes=figures[1],
            reserved_bytes=figures[2],
            peak_requested_bytes=figures[3],
            peak_allocated_bytes=figures[4],
            peak_reserved_bytes=figures[5],
            num_alloc_retries=figures[6],
        )

    @property
    def num_device_calls(self) -> int:
        """How often memory was taken from the device or given back to it."""
        return self._figures()[7]

    def _figures(self) -> tuple[int, ...]:
        found = (ctypes.c_int64 * 8)()
        self._library.memfit_allocator_stats(self._handle, found)
        return tuple(found)

    def allocate(self, block_id: int, num_bytes: int) -> None:
        """Serve a request; see `CachingAllocator.allocate`."""
        if num_bytes > 0 and not self._library.memfit_allocator_request(
            self._handle, block_id, num_bytes
        ):
            raise self._out_of_memory(num_bytes)

    def play(
        self,
        table: EventTable,
        samples: int,
        *,
        sizes: array[int],
        plans: array[int],
        start: int = 0,
    ) -> int | None:
        """Carry out a stretch of events.

        Args:
            table: The events.
            samples: How many samples more there are than in the recording.
            sizes: The bytes of each need.
            plans: The bytes of the plan that was taken in place of each need's own, or -1.
            start: The first event to carry out, as a position in the table.

        Returns:
            `None` at the end; else the position of a need whose plan finds no room.

        Raises:
            AllocatorOutOfMemoryError: A request found no room.
        """
        at, asked = ctypes.c_int64(start), ctypes.c_int64()
        ending = self._library.memfit_allocator_play(
            self._handle,
            ctypes.byref(table.program),
            samples,
            sizes.buffer_info()[0],
            plans.buffer_info()[0],
            ctypes.byref(at),
            ctypes.byref(asked),
        )
        if ending == _ENDED:
            return None
        if ending == _PLAN_FINDS_NO_ROOM:
            return at.value
        if ending != _OUT_OF_MEMORY:
            raise MemoryError
        raise self._out_of_memory(asked.value)

    def _out_of_memory(self, num_bytes: int) -> AllocatorOutOfMemoryError:
        stats = self.stats
        return AllocatorOutOfMemoryError.because(
            num_bytes,
            reserved_bytes=stats.reserved_bytes,
            allocated_bytes=stats.allocated_bytes,
            capacity_bytes=self._capacity_bytes,
        )


def new_allocator(
    *, capacity_bytes: int | None, settings: AllocatorSettings
) -> CachingAllocator | CompiledAllocator:
    """Return the quickest allocator for some settings.

    Args:
        capacity_bytes: Bytes that can be taken from the device; `None` for no limit.
        settings: The allocator's options.
    """
    usual = AllocatorSettings(
        large_segment_bytes=settings.large_segment_bytes, block_order=settings.block_order
    )
    library = _library() if settings == usual else None
    if library is None:
        return CachingAllocator(capacity_bytes=capacity_bytes, settings=settings)
    return CompiledAllocator(library, capacity_bytes=capacity_bytes, settings=settings)


def carried_folder(root: Path) -> Path:
    """Return the folder in a wheel with the library of this source for this processor."""
    return root / platform.machine() / source_digest()


def source_digest() -> str:
    """Return a digest of the source and of the way in which it is compiled."""
    digest = hashlib.sha256(" ".join(_COMPILING).encode())
    for source in _SOURCES:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:20]


def compile_library(folder: Path, command: tuple[str, ...], *, flags: tuple[str, ...] = ()) -> None:
    """Compile the library into a folder.

    Args:
        folder: The folder to write it to.
        command: The compiler.
        flags: More of its options, as in `("-Werror",)`.

    Raises:
        UnsupportedError: The compiler fails.
    """
    target = str(folder / LIBRARY)
    run_compiler(
        [*command, *_COMPILING, *flags, "-o", target, str(_SOURCES[0])],
        makes="the replay of a step",
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Load the library; compile it first if need be. `None` if that cannot be done here."""
    # On macOS, a command of this name may open a window that asks to install a compiler.
    if sys.platform != "linux":
        return None
    try:
        return opened(_library_folder())
    except (UnsupportedError, OSError) as exc:
        _log.debug("Steps are replayed in Python: %s", exc)
        return None


def opened(folder: Path) -> ctypes.CDLL:
    """Return the library in a folder, with the types of its functions."""
    library = ctypes.CDLL(str(folder / LIBRARY))
    handle, number = ctypes.c_void_p, ctypes.c_int64
    library.memfit_allocator_new.restype = handle
    library.memfit_allocator_new.argtypes = (number, number, ctypes.c_int)
    library.memfit_allocator_delete.restype = None
    library.memfit_allocator_delete.argtypes = (handle,)
    library.memfit_allocator_stats.restype = None
    library.memfit_allocator_stats.argtypes = (handle, handle)
    library.memfit_allocator_request.argtypes = (handle, number, number)
    library.memfit_allocator_play.argtypes = (handle, handle, number, *[handle] * 4)
    return library


def _library_folder() -> Path:
    carried = carried_folder(_CARRIED)
    if (carried / LIBRARY).is_file():
        return carried

    def compile_into(folder: Path) -> None:
        command = compiler()
        if command is None:
            raise UnsupportedError("There is no C compiler.")
        compile_library(folder, command)

    return compile_into_cache(
        "replay", source_digest(), compile_into, names=(LIBRARY,), loads="the replay of a step"
    )
