"""What the command line trains: a timm model, or `package.module:function`.

The function returns a `memfit.Workload`. It is imported as Python would import it in the current
folder.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from memfit.errors import MemfitError, WorkloadError

if TYPE_CHECKING:
    from types import ModuleType

    from memfit.step.workload import Workload

    Subject: TypeAlias = str | Workload
else:
    Subject = Any

__all__ = ["Subject", "is_place", "name_of", "subject_of"]

# "hf-hub:timm/resnet50" is a model's name. The slash tells it apart.
_PLACE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_place(text: str) -> bool:
    """Whether an argument of the command line is `package.module:function`."""
    return _PLACE.fullmatch(text) is not None


def subject_of(text: str) -> Subject:
    """Return the model or workload that an argument of the command line names.

    Args:
        text: A timm model's name, which is returned as it is, or `package.module:function`.

    Raises:
        WorkloadError: There is no such module or function, or it does not return a `Workload`.
    """
    if not is_place(text):
        return text
    from memfit.step.workload import Workload

    module_name, _, path = text.partition(":")
    found: Any = _imported(module_name)
    for name in path.split("."):
        found = _attribute(found, name, module_name)
    if isinstance(found, type) or (callable(found) and not isinstance(found, Workload)):
        found = _called(found, text)
    if isinstance(found, str):
        raise WorkloadError(
            f"{text} is the text {found!r}. To name a timm model, write its name here. A function "
            "must return a memfit.Workload."
        )
    if not isinstance(found, Workload):
        raise WorkloadError(
            f"{text} must return a memfit.Workload(model, batch, loss, optimizer), not "
            f"{type(found).__name__}."
        )
    return found


def name_of(subject: Subject) -> str:
    """Return the name of a subject in messages."""
    return subject if isinstance(subject, str) else subject.name


def _imported(name: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name != missing and not name.startswith(f"{missing}."):
            raise WorkloadError(f"{name} imports {missing}, which is not installed.") from error
        files = [path.stem for path in Path.cwd().glob("*.py")]
        near = difflib.get_close_matches(name.partition(".")[0], files, n=1)
        hint = f"; did you mean {near[0]}?" if near and near[0] != name else "."
        raise WorkloadError(
            f"There is no module {missing!r} in {folder}, and none is installed{hint}"
        ) from error
    except Exception as error:
        raise WorkloadError(f"{name} cannot be imported: {_said(error)}") from error


def _attribute(holder: Any, name: str, module: str) -> Any:
    try:
        return getattr(holder, name)
    except AttributeError:
        known = [each for each in vars(holder) if not each.startswith("_")]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise WorkloadError(f"{module} has no {name!r}{hint}") from None


def _called(function: Any, text: str) -> Any:
    try:
        needed = [
            parameter.name
            for parameter in inspect.signature(function).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
    except ValueError:
        needed = []
    if needed:
        raise WorkloadError(
            f"{text} needs the arguments {', '.join(needed)}, but memfit gives none: name a "
            "function that needs none."
        )
    try:
        return function()
    except MemfitError:
        raise
    except Exception as error:
        raise WorkloadError(f"{text} raised {_said(error)}") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
