"""Messages for parts that cannot make a training step, and for a batch without clear samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from memfit.errors import WorkloadError
from memfit.step.batch_rules import ROOT, BatchRules, entries_of, holds_parts, is_plain
from memfit.step.leaves import is_part, num_along
from memfit.step.nesting import opened

__all__ = [
    "check_batch",
    "check_loss",
    "check_model",
    "check_optimizer",
    "check_subject",
    "no_reading",
    "told",
    "two_sizes",
]

_CUT: Final = "cut=function, a function cut(batch, start, stop) that returns those samples"

_WRAPPED_AS = ("optimizer", "opt")


def check_subject(subject: object, workload: type) -> None:
    """Refuse a bare model, and anything else that is no subject, and say what to give.

    Args:
        subject: The value that the user gave as a timm model's name or a `Workload`.
        workload: The class `Workload`.

    Raises:
        WorkloadError: The value is neither of them.
    """
    if isinstance(subject, (str, workload)):
        return
    kind = type(subject).__name__
    if isinstance(subject, type) and issubclass(subject, nn.Module):
        raise WorkloadError(
            f"{subject.__name__} is a class, not an instance, and a model alone is not a whole "
            "training step. Give memfit.Workload(model, batch, loss, optimizer)."
        )
    if isinstance(subject, nn.Module):
        raise WorkloadError(
            f"A {kind} alone is not a whole training step. Give "
            "memfit.Workload(model, batch, loss, optimizer), with a batch as in "
            "your training loop."
        )
    raise WorkloadError(
        f"Give the name of a timm model or a memfit.Workload, not {_full_name(subject)}. A fastai "
        "Learner, a LightningModule and a transformers Trainer are taken too."
    )


def check_model(model: object) -> None:
    """Refuse a value that is no model.

    Raises:
        WorkloadError: The value is a class, or no `nn.Module`.
    """
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise WorkloadError(
            f"The model is the class {model.__name__}, not an instance. Give an instance, "
            f"{model.__name__}(...)."
        )
    hint = ""
    if isinstance(model, str):
        hint = ". A timm model is given by its name in place of a Workload"
    raise WorkloadError(f"The model must be an nn.Module, not {type(model).__name__}{hint}.")


def check_loss(loss: object) -> None:
    """Refuse a loss that cannot be called with outputs and targets.

    Raises:
        WorkloadError: The loss is a class, or it is not a function.
    """
    if isinstance(loss, type):
        raise WorkloadError(
            f"The loss is the class {loss.__name__}, not an instance, so the "
            f"outputs would become its settings. Give an instance, {loss.__name__}()."
        )
    if not callable(loss):
        raise WorkloadError(
            "The loss must be a function of the outputs and targets, such as "
            f"torch.nn.functional.cross_entropy, not {type(loss).__name__}. For a model that "
            "returns its loss, give lambda outputs: outputs.loss."
        )


def check_optimizer(optimizer: object) -> None:
    """Refuse a value that is neither a torch optimizer nor a way to make one.

    Raises:
        WorkloadError: The value is a trainer's wrapper, or something else.
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
    """Refuse what makes batches in place of a batch.

    Raises:
        WorkloadError: The value is a loader, an iterator or a data set.
    """
    kind = type(batch).__name__
    if isinstance(batch, Iterator):
        raise WorkloadError(
            f"The batch is a {kind}, an iterator over batches. Give one of them: next(iterator)."
        )
    if isinstance(batch, Dataset):
        raise WorkloadError(
            f"The batch is a {kind}, which holds samples. Give a batch of its loader: "
            "next(iter(loader))."
        )
    if isinstance(batch, DataLoader) or type(batch).__name__.endswith("DataLoader"):
        raise WorkloadError(
            f"The batch is a {kind}, which makes batches. Give one "
            "of its batches: next(iter(loader))."
        )


def _full_name(value: object) -> str:
    kind = type(value)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )


def no_reading(batch: Any, rules: BatchRules, num_samples: int | None) -> str:
    """Return a message: which parts of a batch do not fit together, and what the user can give."""
    unknown = _first_unknown(batch, ROOT, rules.by_path(batch))
    if unknown is not None:
        path, name = unknown
        return (
            f"memfit cannot tell where {path}, of the class {name}, has its "
            f"samples. Give {told(path, None)} if it belongs to all of them, or "
            f"{_CUT}."
        )
    parts = list(_parts_of(batch, ROOT, rules.by_path(batch)))
    # Lists of names and numbers come first, because they are less likely to hold samples.
    found = [(n, path) for n, path, is_list in sorted(parts, key=lambda part: not part[2])]
    if not found:
        return (
            "The batch has no tensor with a leading dimension, so it has no batch "
            "size. Give tensors of shape (samples, ...), lists with one entry for "
            "each sample, or a function of the batch size."
        )
    counted = Counter(size for size, _ in found)
    # If two sizes have equally many parts, take the later ones, which are the targets.
    usual = num_samples or max(reversed(counted), key=counted.__getitem__)
    odd_size, odd = next(((n, where) for n, where in found if n != usual), found[0])
    size, where = next(((n, where) for n, where in found if n == usual), found[-1])
    first, second = sorted(((odd, odd_size), (where, size)), key=lambda one: one[0])
    if len(counted) > 2:  # noqa: PLR2004 - a graph's nodes and edges, say
        advice = f"give {_CUT}; to search, a function of the batch size is enough"
    elif (
        len(found) == 2  # noqa: PLR2004 - inputs and targets, of which either may be wrong
        and not any(is_list for _, _, is_list in parts)
        and not _other_dimension(batch, odd, usual)
    ):
        return (
            f"The batch's leading dimensions differ: {first[0]} has {first[1]} and "
            f"{second[0]} has {second[1]}. Both need one entry for each sample, so look at how the "
            f"batch is made. If one of them belongs to all samples, give {told(first[0], None)} or "
            f"{told(second[0], None)}, or {_CUT}."
        )
    else:
        instead = _other_dimension(batch, odd, usual)
        advice = f"give {told(odd, None)} if that part belongs to all samples, {instead}or {_CUT}"
    return (
        f"The batch's leading dimensions differ: {first[0]} has {first[1]} and "
        f"{second[0]} has {second[1]}; {advice}."
    )


def _other_dimension(batch: Any, path: str, size: int) -> str:
    """Return what to give if another dimension of a part counts the samples, as text."""
    part = dict(_named_parts(batch, ROOT)).get(path)
    shape = tuple(getattr(part, "shape", ()))
    dims = [dim for dim, length in enumerate(shape) if length == size]
    return f"{told(path, dims[0])} if dimension {dims[0]} counts them, " if len(dims) == 1 else ""


def _named_parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, value
    container = None if is_part(value) else opened(value)
    if container is not None:
        for key, inner in zip(container.keys, container.values, strict=True):
            yield from _named_parts(inner, path + key)


def _parts_of(
    value: Any, path: str, said: Mapping[str, int | None]
) -> Iterator[tuple[int, str, bool]]:
    """Yield for each part its number of entries, its name, and whether it is a list."""
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
    """Return the code with which a user gives the dimension of a part."""
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
    """Return a message: the batch can have two numbers of samples, and how to say which one."""
    where = dict(reversed(list(entries_of(batch, rules))))
    first, second = ((size, where[size]) for size in sizes[:2])
    return (
        f"The batch can be read as {first[0]} samples ({first[1]}) or as "
        f"{second[0]} ({second[1]}). Give {told(first[1], 0)} or "
        f"{told(second[1], 0)} to say which, or give a batch in which the two "
        "numbers differ."
    )
