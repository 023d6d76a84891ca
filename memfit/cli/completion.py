"""Shell completion of the names of timm models and cards.

Importing timm takes seconds, and a shell asks at every key press. So the models' names are kept in
the user's cache, in one file for each version of timm.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from memfit.user_cache import cache_folder

__all__ = ["complete_gpus", "complete_models", "model_names"]


def complete_models(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the timm models that begin with the typed text."""
    return [CompletionItem(name) for name in model_names() if name.startswith(incomplete)]


def complete_gpus(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the cards that have a short name beginning with the typed text."""
    from memfit.cards import catalogue

    typed = incomplete.lower()
    return [
        CompletionItem(alias, help=gpu.name)
        for gpu in catalogue()
        for alias in gpu.aliases
        if alias.startswith(typed) and " " not in alias
    ]


def model_names() -> list[str]:
    """Return the names of all timm models, from the cache if they are in it."""
    path = _cache_file()
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8").split()
    from memfit.step.timm_models import import_timm

    names: list[str] = import_timm().list_models()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another shell may be reading, so the file must appear complete.
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text("\n".join(names), encoding="utf-8")
        part.replace(path)
    return names


def _cache_file() -> Path:
    import importlib.metadata

    return cache_folder() / f"models-of-timm-{importlib.metadata.version('timm')}.txt"
