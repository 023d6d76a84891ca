"""Shell completion of the names of timm models, optimizers and cards.

Importing timm takes seconds, and a shell asks at every key press. So its names are kept in the
user's cache, in one file of each kind for each version of timm.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import click
from click.shell_completion import CompletionItem

from memfit.user_cache import cache_folder

__all__ = [
    "complete_gpus",
    "complete_models",
    "complete_optimizers",
    "model_names",
    "optimizer_names",
]


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


def complete_optimizers(
    _context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return timm's optimizers that begin with the typed text."""
    return [CompletionItem(name) for name in optimizer_names() if name.startswith(incomplete)]


def model_names() -> list[str]:
    """Return the names of all timm models, from the cache if they are in it."""

    def listed() -> list[str]:
        from memfit.step.timm_models import import_timm

        return list(import_timm().list_models())

    return _kept("models", listed)


def optimizer_names() -> list[str]:
    """Return the names of all optimizers of timm, from the cache if they are in it."""

    def listed() -> list[str]:
        from timm.optim import list_optimizers

        return list(list_optimizers())

    return _kept("optimizers", listed)


def _kept(what: str, listed: Callable[[], list[str]]) -> list[str]:
    """Return names from the cache, or list them and keep them there."""
    import importlib.metadata  # slow, and the help needs none

    path = cache_folder() / f"{what}-of-timm-{importlib.metadata.version('timm')}.txt"
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8").split()
    names = listed()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another shell may be reading, so the file must appear complete.
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text("\n".join(names), encoding="utf-8")
        part.replace(path)
    return names
