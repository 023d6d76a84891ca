"""Finds the line of the script that led to an event, from the frames of the running Python."""

from __future__ import annotations

import itertools
import os
import sys
import sysconfig
from types import FrameType
from typing import Any

from .internals import frame_of_main_thread

__all__ = ["Place", "here", "of_script"]

_OWN = os.path.dirname(os.path.abspath(__file__)) + os.sep  # noqa: PTH100, PTH120 - no pathlib here
_LIBRARIES = tuple(
    {
        os.path.join(path, "")  # noqa: PTH118 - see above
        for path in (*sysconfig.get_paths().values(), sys.base_prefix + "/lib", sys.prefix + "/lib")
        # A bin folder or an installation prefix can hold the user's scripts too.
        if path and ("lib" in path or "packages" in path)
    }
)
_MAX_FRAMES = 400
_MAX_OWN = 12  # `values` lies this deep at most, with torch's functions that it calls.
# A subclass of Tensor runs every operation from here, so these lines say nothing about it.
_DISPATCHERS = ("__torch_function__", "__torch_dispatch__")
_PRINTER = f"{os.sep}torch{os.sep}_tensor_str.py"


class Place:
    """The place in a program where something happened.

    Args:
        script: The innermost line of the script itself, as `file:line`; `None` if only libraries
            are running.
        library: The innermost line of a file that does not belong to torch; `None` if there is
            none.
        innermost: The innermost line of all, also in torch.
        frames: The frames, the innermost first.
    """

    __slots__ = ("frames", "innermost", "library", "script")

    def __init__(self, frames: list[FrameType]) -> None:
        self.frames = frames
        self.script: str | None = None
        self.library: str | None = None
        self.innermost: str | None = None
        for frame in frames:
            path = frame.f_code.co_filename
            shown = f"{path}:{frame.f_lineno}"
            self.innermost = self.innermost or shown
            if self.library is None and not _is_torch(path):
                self.library = shown
            if self.script is None and _is_script(path):
                self.script = shown

    @property
    def instruction(self) -> int | None:
        """The index of the innermost frame's instruction; `None` without a frame."""
        return self.frames[0].f_lasti if self.frames else None

    @property
    def is_printing(self) -> bool:
        """Whether torch makes the text of a tensor here."""
        return any(frame.f_code.co_filename.endswith(_PRINTER) for frame in self.frames)

    def spots(self) -> list[tuple[str, int, int, int | None, int | None]]:
        """Return the file, the first and last line, and the columns of one or two frames.

        The first one is the innermost frame. If it is in torch, the second one is the innermost
        frame outside of torch. The columns are `None` before Python 3.11.
        """
        frames = self.frames[:1]
        if frames and _is_torch(frames[0].f_code.co_filename):
            outside = (f for f in self.frames if not _is_torch(f.f_code.co_filename))
            frames += [frame for frame in (next(outside, None),) if frame is not None]
        return [_spot(frame) for frame in frames]


def _spot(frame: FrameType) -> tuple[str, int, int, int | None, int | None]:
    path, line = frame.f_code.co_filename, frame.f_lineno
    if sys.version_info >= (3, 11) and frame.f_lasti >= 0:
        positions = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
        first, last, column, end_column = positions
        return path, first or line, last or line, column, end_column
    return path, line, line, None, None


def here(frame: FrameType | None) -> Place:
    """Return the place at which a thread is.

    Args:
        frame: Its innermost frame. If the thread runs no Python but what the watch has called, as
            a thread of autograd, the frames of the main thread are used.
    """
    return Place(_outwards(frame_of_main_thread() if _is_begun_by_watch(frame) else frame))


def of_script(recorded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the frames of a recorded stack that lie outside the watch, the innermost first."""
    own = [
        index
        for index, frame in enumerate(recorded[:_MAX_OWN])
        if frame["filename"].startswith(_OWN)
    ]
    return recorded[own[-1] + 1 :] if own else recorded


def _is_begun_by_watch(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_back is not None:
        frame = frame.f_back
    return frame is None or frame.f_code.co_filename.startswith(_OWN)


def _outwards(frame: FrameType | None) -> list[FrameType]:
    frames: list[FrameType] = []
    while frame is not None and len(frames) < _MAX_FRAMES:
        code = frame.f_code
        if not code.co_filename.startswith(_OWN) and code.co_name not in _DISPATCHERS:
            frames.append(frame)
        frame = frame.f_back
    return frames


def _is_torch(path: str) -> bool:
    return f"{os.sep}torch{os.sep}" in path and path.startswith(_LIBRARIES)


def _is_script(path: str) -> bool:
    return not path.startswith(("<frozen", "<string>", *_LIBRARIES))
