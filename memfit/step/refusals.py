"""What is said of parts that make no training step, and of a batch whose samples cannot be told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from memfit.errors import WorkloadError
from memfit.step.batch_rules import ROOT, BatchRules, entries_of, holds_parts, is_plain
from memfit.step.leaves import is_part, num_along
from memfit.step.nesting import opened

__all__ = [
    "check_batch",
    "check_loss",
    "check_optimizer",
    "check_subject",
    "no_reading",
    "told",
    "two_sizes",
]

_CUT: Final = "cut=function, a function cut(batch, start, stop) that returns those samples"

_WRAPPED_AS = ("optimizer", "opt")


def check_subject(subject: object, workload: type) -> None:
    """Say of a bare model, or a trainer's own object, how it is made a `Workload`.

    Args:
        subject: What was given as a timm model's name or a `Workload`.
        workload: The class `Workload`.

    Raises:
        WorkloadError: It is neither.
    """
    if isinstance(subject, (str, workload)):
        return
    kind = type(subject).__name__
    if isinstance(subject, nn.Module):
        raise WorkloadError(
            f"A {kind} alone makes no training step: give memfit.Workload(model, batch, loss, "
            "optimizer), with a batch as the training loop has it."
        )
    if hasattr(subject, "dls") and hasattr(subject, "loss_func"):
        raise WorkloadError(
            f"A fastai {kind} is not taken as it is: give memfit.Workload(learn.model, "
            "learn.dls.one_batch(), learn.loss_func, torch.optim.AdamW), with the optimizer that "
            "you train with."
        )
    raise WorkloadError(
        f"What is trained is a timm model's name or a memfit.Workload, not {_full_name(subject)}."
    )


def check_loss(loss: object) -> None:
    """Refuse what is called as no loss is.

    Raises:
        WorkloadError: It is a class, or cannot be called.
    """
    if isinstance(loss, type):
        raise WorkloadError(
            f"The loss is the class {loss.__name__}, and its first arguments would be taken for "
            f"settings: give an instance, {loss.__name__}()."
        )
    if not callable(loss):
        raise WorkloadError(f"The loss must be a function, not {type(loss).__name__}.")


def check_optimizer(optimizer: object) -> None:
    """Refuse what is no torch optimizer and makes none.

    Raises:
        WorkloadError: It is a trainer's wrapper, or something else.
    """
    if isinstance(optimizer, (Optimizer, str)) or callable(optimizer):
        return
    inner = next(
        (name for name in _WRAPPED_AS if isinstance(getattr(optimizer, name, None), Optimizer)),
        None,
    )
    wrapped = "" if inner is None else f"; the one inside it is its .{inner}"
    raise WorkloadError(
        "The optimizer must be a torch.optim.Optimizer, a function that makes one from parameters, "
        f"or a name, not {_full_name(optimizer)}{wrapped}."
    )


def check_batch(batch: object) -> None:
    """Refuse a loader of batches in place of a batch.

    Raises:
        WorkloadError: It is a loader.
    """
    if isinstance(batch, DataLoader) or type(batch).__name__.endswith("DataLoader"):
        raise WorkloadError(
            f"The batch is a {type(batch).__name__}, which makes batches: give one of them, "
            "next(iter(loader))."
        )


def _full_name(value: object) -> str:
    kind = type(value)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )


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
