"""How a record looks when it is printed and in a notebook.

A record does not know about tables. `memfit.reports` registers a function for each kind of record.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["html_of", "register_look", "text_of"]

_LOOKS: dict[type, tuple[Callable[[Any], str], Callable[[Any], str]]] = {}


def register_look(
    kind: type, *, as_text: Callable[[Any], str], as_html: Callable[[Any], str]
) -> None:
    """Register how records of a kind look.

    Args:
        kind: The record's class.
        as_text: A function of a record; it returns the text that `print` shows.
        as_html: A function of a record; it returns the HTML that a notebook shows.
    """
    _LOOKS[kind] = (as_text, as_html)


def text_of(record: object) -> str | None:
    """Return the text that `print` shows; `None` if no function is registered."""
    look = _LOOKS.get(type(record))
    return None if look is None else look[0](record)


def html_of(record: object) -> str | None:
    """Return the HTML that a notebook shows; `None` if no function is registered."""
    look = _LOOKS.get(type(record))
    return None if look is None else look[1](record)
