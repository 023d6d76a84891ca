"""Sets up the watch in a Python that has just started, and waits for the script to import torch.

In a process that never imports torch, nothing else is done.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

__all__ = ["SETTINGS", "begin"]

SETTINGS = "MEMFIT_REHEARSAL_WATCH"
"""The environment variable that carries the watch's settings, as JSON."""


def begin() -> None:
    """Start the watch when torch is imported."""
    settings = json.loads(os.environ[SETTINGS])

    def watch(torch: ModuleType) -> None:
        from .watching import Watch

        Watch(torch, settings).begin()

    after_import("torch", watch)


def after_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call a function with a module after its import. If it is imported already, call it at once.

    Args:
        name: The module's full name.
        then: The function to call.
    """
    module = sys.modules.get(name)
    if module is not None:
        then(module)
    else:
        sys.meta_path.insert(0, _Finder(name, then))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as Python would, and calls a function after the module's code has run."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name = name
        self._then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self._then)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Wraps the module's own loader, which is put back before the module runs."""

    def __init__(self, loader: Any, then: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._then = then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._then(module)
