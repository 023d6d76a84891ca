"""What every record is."""

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

    `MEASURED`: real steps on a device that was there. `REHEARSED`: torch's own software on a card
    that was not there, with kernels that do nothing. `SIMULATED`: a model of the card.
    """

    MEASURED = "measured"
    REHEARSED = "rehearsed"
    SIMULATED = "simulated"


class Engine(str, enum.Enum):
    """How a card that is not there is tried.

    `REHEARSE` and `SIMULATE` are what `Source` says of them. `AUTO` rehearses one card where this
    system can, and simulates otherwise; several cards it simulates.
    """

    AUTO = "auto"
    REHEARSE = "rehearse"
    SIMULATE = "simulate"


class Record:
    """What every record can do."""

    __slots__ = ()

    _derived: ClassVar[tuple[str, ...]] = ()
    """Properties that `to_dict` gives beside the fields."""

    def __str__(self) -> str:
        return looks.text_of(self) or repr(self)

    def _repr_html_(self) -> str | None:
        """Return what a notebook shows; `None` for its plain text."""
        return looks.html_of(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values for JSON, with a `schema_version`.

        Enums become their values, tuples become lists, and missing values stay `None`. So does a
        number that is not finite, because JSON has none.
        """
        return {"schema_version": SCHEMA_VERSION, **_plain_fields(self)}


def no_such_answer(kind: str, name: str) -> str:
    """Say why a record of several cards lacks what one of a single card has.

    Args:
        kind: The record's class.
        name: The attribute that was asked for.
    """
    return (
        f"{kind!r} has no {name!r}: it holds one answer for each of several GPUs, in .answers. For "
        "a single answer give gpu=..., or device='cpu' to measure on the CPU."
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
