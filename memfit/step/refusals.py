"""What is said of a batch whose samples cannot be told: why, and what to say about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from memfit.step.batch_rules import ROOT, BatchRules, entries_of, holds_parts, is_plain
from memfit.step.leaves import is_part, num_along
from memfit.step.nesting import opened

__all__ = ["no_reading", "told", "two_sizes"]

_CUT: Final = "cut=function, a function cut(batch, start, stop) that returns those samples"


def no_reading(batch: Any, rules: BatchRules, num_samples: int | None) -> str:
    """Say what does not fit together in a batch, and what to say about it."""
    unknown = _first_unknown(batch, ROOT, rules.by_path(batch))
    if unknown is not None:
        path, name = unknown
        return (
            f"It cannot be told where a {name} ({path}) has its samples: give "
            f"{told(path, None)} if it belongs to all of them, or {_CUT}."
        )
    parts = list(_parts_of(batch, ROOT, rules.by_path(batch)))
    # Lists of names and numbers first, because they are the less likely to tell.
    found = [(n, path) for n, path, is_list in sorted(parts, key=lambda part: not part[2])]
    if not found:
        return (
            "The batch holds no tensor with a leading dimension, so it has no batch size; give "
            "tensors of shape (samples, ...), lists of one entry for each sample, or a function of "
            "the batch size."
        )
    counted = Counter(size for size, _ in found)
    # Of as many parts each, those that come last: the targets.
    usual = num_samples or max(reversed(counted), key=counted.__getitem__)
    odd_size, odd = next(((n, where) for n, where in found if n != usual), found[0])
    size, where = next(((n, where) for n, where in found if n == usual), found[-1])
    first, second = sorted(((odd, odd_size), (where, size)), key=lambda one: one[0])
    if len(counted) > 2:  # noqa: PLR2004 - a graph's nodes and edges, say
        advice = f"give {_CUT}; to search, a function of the batch size is enough"
    else:
        advice = f"give {told(odd, None)} if that part belongs to all samples, or {_CUT}"
    return (
        f"The batch's leading dimensions differ: {first[0]} has {first[1]} and {second[0]} has "
        f"{second[1]}; {advice}."
    )


def _parts_of(
    value: Any, path: str, said: Mapping[str, int | None]
) -> Iterator[tuple[int, str, bool]]:
    """Yield how many entries each part has, where it is, and whether it is a list."""
    if path in said and said[path] is None:
        return
    if is_part(value):
        num = num_along(value, said.get(path) or 0)
        if num is not None:
            yield num, path, False
        return
    container = opened(value)
    if container is None:
        return
    if container.is_sequence and path != ROOT and not holds_parts(container.values):
        if container.values:
            yield len(container.values), path, True
        return
    for key, inner in zip(container.keys, container.values, strict=True):
        yield from _parts_of(inner, path + key, said)


def told(path: str, dim: int | None) -> str:
    """Write what a user would say of a part, as code."""
    return f"batch_dims={{{path!r}: {dim}}}"


def _first_unknown(value: Any, path: str, said: Mapping[str, int | None]) -> tuple[str, str] | None:
    if path in said or is_part(value):
        return None
    container = opened(value)
    if container is None:
        return None if is_plain(value) else (path, type(value).__name__)
    if container.is_sequence and path != ROOT and not holds_parts(container.values):
        return None
    inner = zip(container.keys, container.values, strict=True)
    found = (_first_unknown(each, path + key, said) for key, each in inner)
    return next((one for one in found if one is not None), None)


def two_sizes(batch: Any, rules: BatchRules, sizes: list[int]) -> str:
    """Say that a batch has two numbers of samples, and how to say which is right."""
    where = dict(reversed(list(entries_of(batch, rules))))
    first, second = ((size, where[size]) for size in sizes[:2])
    return (
        f"The batch can be read as {first[0]} samples ({first[1]}) or as {second[0]} "
        f"({second[1]}): give {told(first[1], 0)} or {told(second[1], 0)} to say "
        "which, or a batch in which they differ."
    )
