"""Which models are meant: names, wildcards, `all`, files of names, and image sizes after an `@`."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

from memfit.errors import UnknownModelError, UsageError
from memfit.step.timm_models import check_model_name, import_timm
from memfit.sweeping.wildcards import nearest_pattern
from memfit.units import parse_image_size

__all__ = ["Selected", "family_of", "select"]

_WILDCARD = re.compile(r"[*?\[]")
_EVERYTHING = "all"


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Selected:
    """A model, and the image size that was asked for with it.

    Args:
        name: The model's name in timm.
        image_size: Height and width in pixels; `None` if no size was given.
    """

    name: str
    image_size: tuple[int, int] | None = None


def select(patterns: str | Iterable[str]) -> tuple[Selected, ...]:
    """Return the models that patterns mean, each once, in the order in which they were given.

    Args:
        patterns: A model's name, a wildcard such as `"convnext_*"`, `"all"`, or a file with one of
            these in each line. After an `@` there may be an image size: `"convnext_tiny@288"`. In a
            file, a line that begins with `#` is a comment.

    Raises:
        UnknownModelError: timm has no model of a name, or none that a wildcard matches.
        UsageError: No pattern was given, or a file cannot be read or is empty.
    """
    given = _names((patterns,) if isinstance(patterns, str) else tuple(patterns))
    if not given:
        raise UsageError("No model was named: give names, wildcards such as 'convnext_*', or all.")
    found = [model for pattern in given for model in _meant(pattern)]
    return tuple(dict.fromkeys(found))


def _names(patterns: tuple[object, ...]) -> tuple[str, ...]:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise UsageError(
                f"A model is named here as timm names it, and {type(pattern).__name__} is no name. "
                "memfit.survey takes a Workload."
            )
    return cast("tuple[str, ...]", patterns)


def _meant(pattern: str) -> Sequence[Selected]:
    path = Path(pattern)
    if path.suffix == ".txt" or (path.parent != Path() and path.is_file()):
        return [model for line in _lines(path) for model in _matching(line)]
    return _matching(pattern)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{path} cannot be read as a list of models: {why}.") from error
    lines = [line.strip() for line in text.splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        raise UsageError(f"{path} names no model: write one name or wildcard in each line.")
    return names


def _matching(pattern: str) -> Sequence[Selected]:
    name, at, size = pattern.partition("@")
    image_size = parse_image_size(size) if at else None
    if name == _EVERYTHING:
        return [Selected(each, image_size) for each in import_timm().list_models()]
    if _WILDCARD.search(name):
        known = import_timm().list_models()
        matched = fnmatch.filter(known, name)
        if not matched:
            near = nearest_pattern(name, known)
            instead = f"; did you mean {near!r}?" if near else ", and no name is near it."
            raise UnknownModelError(
                f"No model of timm {import_timm().__version__} matches {name!r}{instead}"
            )
        return [Selected(each, image_size) for each in matched]
    check_model_name(name)
    return [Selected(name, image_size)]


def family_of(name: str) -> str:
    """Return the name of timm's module that defines a model, such as `convnext`.

    Args:
        name: The model's name, with or without the tag of its weights.
    """
    entry = import_timm().model_entrypoint(name.partition(".")[0])
    return str(entry.__module__).rpartition(".")[2]
