"""How a record looks in print and in a notebook, as whoever lays records out has registered it.

A record knows nothing of tables. `memfit.reports` registers what it makes of each kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["html_of", "register_look", "text_of"]

_LOOKS: dict[type, tuple[Callable[[Any], str], Callable[[Any], str]]] = {}


def register_look(
    kind: type, *, as_text: Callable[[Any], str], as_html: Callable[[Any], str]
) -> None:
    """Say how records of a kind look.

    Args:
        kind: The record's class.
        as_text: From a record to what `print` shows.
        as_html: From a record to what a notebook shows.
    """
    _LOOKS[kind] = (as_text, as_html)


def text_of(record: object) -> str | None:
    """Return what `print` shows of a record; `None` where nobody has said."""
    look = _LOOKS.get(type(record))
    return None if look is None else look[0](record)


def html_of(record: object) -> str | None:
    """Return what a notebook shows of a record; `None` where nobody has said."""
    look = _LOOKS.get(type(record))
    return None if look is None else look[1](record)
