"""The base class of every record."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any, ClassVar

from memfit.records import looks

__all__ = ["SCHEMA_VERSION", "Engine", "Record", "Source", "no_such_answer"]

SCHEMA_VERSION = 1
"""Version of what `to_dict` gives; it rises when a key changes meaning or goes."""


class Source(str, enum.Enum):
    """Where a figure comes from.

    `MEASURED`: real steps ran on a real device. `REHEARSED`: torch's own software ran for a card
    that was not in the machine, with kernels that do nothing. `SIMULATED`: a model of the card.
    """

    MEASURED = "measured"
    REHEARSED = "rehearsed"
    SIMULATED = "simulated"


class Engine(str, enum.Enum):
    """How a card that is not in the machine is tried.

    `Source` describes rehearsal and simulation. `AUTO` rehearses a single card if this system can,
    and simulates it otherwise. Several cards are always simulated.
    """

    AUTO = "auto"
    REHEARSE = "rehearse"
    SIMULATE = "simulate"


class Record:
    """The methods that every record has."""

    __slots__ = ()

    _derived: ClassVar[tuple[str, ...]] = ()
    """Properties that `to_dict` includes in addition to the fields."""

    def __str__(self) -> str:
        return looks.text_of(self) or repr(self)

    def _repr_html_(self) -> str | None:
        """Return the HTML that a notebook shows; `None` to show plain text."""
        return looks.html_of(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Write what IPython's shell shows: the text of `print`."""
        del cycle
        printer.text(str(self))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values for JSON, with a `schema_version`.

        Enums become their values, tuples become lists, and missing values stay `None`. A
        number that is not finite becomes `None`, because JSON has no such numbers.
        """
        return {"schema_version": SCHEMA_VERSION, **_plain_fields(self)}


def no_such_answer(kind: str, name: str) -> str:
    """Say why a record of several cards lacks an attribute that a single card's record has.

    Args:
        kind: The record's class.
        name: The attribute that was asked for.
    """
    return (
        f"{kind!r} has no {name!r}, because it holds one answer for each of "
        "several GPUs. They are in .answers. For a single answer give gpu=..., "
        "or device='cpu' to measure on the CPU."
    )


def _plain_fields(record: Record) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(record)]  # type: ignore[arg-type]
    return {name: _plain(getattr(record, name)) for name in (*names, *type(record)._derived)}  # noqa: SLF001 - all records are of this class


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return _plain_fields(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
