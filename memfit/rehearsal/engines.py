"""How a card that is not there is tried: rehearsed or simulated. Nothing here imports torch."""

from __future__ import annotations

import os

from memfit.errors import UsageError
from memfit.records import Engine, Source

__all__ = ["ENGINE_VARIABLE", "engine_for_several", "engine_of", "source_of"]

ENGINE_VARIABLE = "MEMFIT_ENGINE"
"""The environment variable that says what `"auto"` is, so that a script need not be changed."""


def engine_of(engine: str | Engine) -> Engine:
    """Return the engine with a name; if MEMFIT_ENGINE is set, `"auto"` means its value.

    Raises:
        UsageError: There is no such engine.
    """
    if engine == Engine.AUTO.value:
        engine = os.environ.get(ENGINE_VARIABLE) or engine
    try:
        return Engine(engine)
    except ValueError:
        known = ", ".join(choice.value for choice in Engine)
        raise UsageError(f"There is no engine {engine!r}; choose one of {known}.") from None


def engine_for_several(engine: str | Engine) -> Engine:
    """Return the engine for several cards; `"auto"` means simulated.

    Raises:
        UsageError: There is no such engine.
    """
    chosen = engine_of(engine)
    return Engine.SIMULATE if chosen is Engine.AUTO else chosen


def source_of(engine: Engine) -> Source:
    """Return the source of an engine's figures."""
    return Source.REHEARSED if engine is Engine.REHEARSE else Source.SIMULATED
