"""Sizes as people write them, to and from integers.

Inside memfit, bytes are `int`. Text becomes a number here. Rates and durations are not handled.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import itertools
import operator
import re
from collections.abc import Sequence
from typing import Any

from memfit.errors import UsageError

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "TIB",
    "format_bytes",
    "format_parts",
    "parse_bytes",
    "parse_count",
    "parse_image_size",
    "parse_value",
    "whole_number",
]

KIB = 1024
MIB = 1024**2
GIB = 1024**3
TIB = 1024**4

_UNIT_BYTES = {
    "B": 1,
    "KiB": KIB,
    "MiB": MIB,
    "GiB": GIB,
    "TiB": 1024**4,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
# A bare letter is binary, as in `ulimit`, Docker and Slurm.
_BARE_UNIT_BYTES = {"K": KIB, "M": MIB, "G": GIB, "T": TIB}
_UNIT_BY_LOWER = {unit.lower(): size for unit, size in (_UNIT_BYTES | _BARE_UNIT_BYTES).items()}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[a-zA-Z]*)\s*")
_IMAGE_SIZE = re.compile(r"\s*(\d+)\s*(?:[xX]\s*(\d+)\s*)?")


def parse_bytes(size: str | float) -> int:
    """Read a number of bytes.

    Args:
        size: Bytes as a whole number (8e9 is one), or text such as `"8GiB"`, `"1500 MiB"`, `"24GB"`
            (decimal, 10**9 bytes a unit) or `"24G"` (binary, like GiB).

    Returns:
        The size in bytes, at least 1.

    Raises:
        UsageError: `size` is not a size, or less than one byte.
    """
    unit = ""
    if not isinstance(size, str):
        num_bytes = _whole_bytes(size)
    else:
        match = _SIZE.fullmatch(size)
        if match is None:
            raise UsageError(f"{size!r} is not a size: write a number and a unit, such as '8GiB'.")
        unit = match["unit"]
        factor = _UNIT_BY_LOWER.get(unit.lower() or "b")
        if factor is None:
            lower = {known.lower(): known for known in _UNIT_BYTES}
            near = difflib.get_close_matches(unit.lower(), lower, n=1, cutoff=0.4)
            advice = (
                f"did you mean '{match['number']}{lower[near[0]]}'?"
                if near
                else "write, say, '8GiB'."
            )
            raise UsageError(f"{size!r} is not a size: there is no unit {unit!r}; {advice}")
        num_bytes = int(float(match["number"]) * factor)
    if num_bytes < 1:
        raise UsageError(f"{size!r} is not a usable size: it must be at least one byte.")
    if not unit and num_bytes < MIB:
        likely = "GiB" if num_bytes < KIB else "MiB"
        raise UsageError(
            f"{size!r} without a unit means {num_bytes} bytes, which is too little. "
            f"Did you mean '{num_bytes}{likely}'?"
        )
    return num_bytes


def _whole_bytes(size: object) -> int:
    whole = whole_number(size)
    if whole is None:
        raise UsageError(
            f"{size!r} is not a size: write a whole number of bytes, or a number and a unit, such "
            "as '8GiB'."
        )
    return whole


def whole_number(value: object) -> int | None:
    """Return a number as an `int` where it is whole: NumPy's integers too, and 8e9.

    Args:
        value: Anything; a truth value is no number.
    """
    if isinstance(value, bool):
        return None
    with contextlib.suppress(TypeError):
        return operator.index(value)  # type: ignore[arg-type]
    return int(value) if isinstance(value, float) and value.is_integer() else None


def parse_count(what: str, value: object) -> int:
    """Read a count of at least 1.

    Args:
        what: What it counts, as the beginning of a sentence, such as `"The batch size"`.
        value: A whole number of any type.

    Raises:
        UsageError: It is not a whole number, or less than 1.
    """
    count = whole_number(value)
    if count is None:
        raise UsageError(f"{what} must be a whole number, not {value!r}.")
    if count < 1:
        raise UsageError(f"{what} must be at least 1, not {count}.")
    return count


def parse_value(text: str) -> Any:
    """Read a value of Python's own literals, such as `0.1`, `True` or `(7, 7)`.

    Args:
        text: The value. Whatever is no literal is text itself.
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_image_size(size: str | int | Sequence[int]) -> tuple[int, int]:
    """Read the height and width of an image.

    Args:
        size: Pixels: one number for a square image, `"320x240"` or `(320, 240)` for height and
            width.

    Returns:
        Height and width in pixels, each at least 1.

    Raises:
        UsageError: `size` is not an image size.
    """
    if isinstance(size, (tuple, list)):
        sides = [whole_number(side) for side in size]
    else:
        match = _IMAGE_SIZE.fullmatch(str(size))
        sides = [] if match is None else [int(match[1]), int(match[2] or match[1])]
    if len(sides) != 2 or None in sides:  # noqa: PLR2004 - height and width
        raise UsageError(
            f"{size!r} is not an image size: give pixels, such as 224, or height and width, "
            "such as 320x240."
        )
    height, width = (side or 0 for side in sides)
    if height < 1 or width < 1:
        raise UsageError(f"{size!r} is not an image size: each side must be at least 1 pixel.")
    return height, width


def format_bytes(num_bytes: int) -> str:
    """Write a number of bytes for people, in binary units and three or four digits.

    Args:
        num_bytes: Bytes; negative for a shrinkage.

    Returns:
        Text such as `"512 B"`, `"1500 MiB"` or `"23.7 GiB"`.
    """
    size = abs(num_bytes)
    sign = "-" if num_bytes < 0 else ""
    if size < KIB:
        return f"{sign}{size} B"
    for unit, factor, limit in (("KiB", KIB, MIB), ("MiB", MIB, 10_000 * MIB)):
        if size < limit:
            return f"{sign}{size / factor:.{0 if size >= 100 * factor else 1}f} {unit}"
    return f"{sign}{size / GIB:.{0 if size >= 1000 * GIB else 1}f} GiB"


def format_parts(sizes: tuple[int, ...]) -> str:
    """Write the parts of a whole as a sum, equal ones together.

    Args:
        sizes: The parts, equal ones side by side.

    Returns:
        Text such as `"4 x 256"` or `"2 x 22 + 20"`.
    """
    groups = [(size, len(list(equal))) for size, equal in itertools.groupby(sizes)]
    if len(sizes) == 1:
        return f"1 x {sizes[0]}"
    return " + ".join(f"{count} x {size}" if count > 1 else str(size) for size, count in groups)
