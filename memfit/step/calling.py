"""Calls a user's model with the inputs of a batch, and marks the errors that it raises.

`memfit.step.batches` cuts batches. This module decides which of their parts are inputs, and in
which form `forward` takes them. If a call fails because the model keeps a tensor of an earlier
batch, of another size, the error says so.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from memfit.errors import WorkloadError
from memfit.memory import oom
from memfit.step.nesting import leaves_of, map_leaves

__all__ = ["call_loss", "call_model", "split_batch", "users_code"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_SHAPE_ERRORS = (RuntimeError, ValueError, IndexError)
_NUM_DIMS = 3  # a hidden state counts samples in its first or second dimension, seldom in its third
_NUM_RETRIES = 12


@contextlib.contextmanager
def users_code() -> Iterator[None]:
    """Mark errors of the user's step, so that `memfit.cli` can tell them from bugs of memfit."""
    try:
        yield
    except Exception as error:
        error.raised_in_step = True  # type: ignore[attr-defined]
        raise


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model with its inputs.

    A mapping is passed by its keys, and a tuple or list one by one. If `forward` cannot take them
    so, but takes one argument (a list of crops, a batch as a dictionary), it gets the whole. A
    packed sequence is one value.

    Args:
        model: The model.
        inputs: Its inputs, of any nesting.

    Raises:
        WorkloadError: The model keeps a tensor of an earlier batch that had another size.
    """
    with users_code():
        try:
            return _called(model, inputs)
        except _SHAPE_ERRORS as error:
            if oom.classify(error) is not oom.Likelihood.NO:
                raise
            reason = _kept_from_another_batch(model, inputs)
            if reason is None:
                raise
            raise WorkloadError(reason) from error


def call_loss(loss: Callable[..., Any], outputs: Any, targets: tuple[Any, ...]) -> Any:
    """Call a loss with the model's outputs and the batch's targets.

    Args:
        loss: The loss.
        outputs: What the model returned.
        targets: The targets, one by one.

    Raises:
        WorkloadError: The loss takes another number of targets.
    """
    try:
        return loss(outputs, *targets)
    except TypeError as error:
        function = loss.forward if isinstance(loss, nn.Module) else loss
        try:
            inspect.signature(function).bind(outputs, *targets)
        except TypeError as mismatch:
            name = getattr(function, "__name__", type(loss).__name__)
            given = f"{len(targets)} targets" if len(targets) != 1 else "1 target"
            raise WorkloadError(
                f"The loss {name if name != 'forward' else type(loss).__name__} cannot take the "
                f"model's outputs and the batch's {given} ({mismatch}). A batch is (inputs, "
                "targets); num_inputs says how many of its first parts are inputs."
            ) from error
        except ValueError:  # a function of C, without a signature
            pass
        raise


def _called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        if not _takes(model, (), inputs) and _takes(model, (inputs,), {}):
            return model(inputs)
        return model(**inputs)
    if isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence):
        if not _takes(model, inputs, {}) and _takes(model, (inputs,), {}):
            return model(inputs)
        return model(*inputs)
    return model(inputs)


def _takes(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a model's `forward` takes some arguments, as far as its signature tells."""
    while isinstance(inner := _wrapped(model), nn.Module):
        model = inner
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # a function of C, without a signature
        return True
    return True


def _wrapped(model: nn.Module) -> object:
    """Return the model inside a wrapper that passes on any arguments."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return model.module
    return vars(model).get("_modules", {}).get("_orig_mod")


# --- state of an earlier batch ------------------------------------------------------------------


def _kept_from_another_batch(model: nn.Module, inputs: Any) -> str | None:
    """Return a message if a call failed because of a tensor that the model keeps.

    This is tried out: the tensors that the model keeps are given the size of this batch, and the
    model is called again. If it runs now, their size was the reason.
    """
    kept = list(_kept_tensors(model))
    given = [leaf for leaf in leaves_of(inputs) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    new_sizes = dict.fromkeys(len(leaf) for leaf in given)
    tried = 0
    for dim in range(_NUM_DIMS):
        for old in dict.fromkeys(
            leaf.shape[dim] for _, _, _, held in kept for leaf in held if leaf.ndim > dim
        ):
            for new in new_sizes:
                if old in (0, new) or new == 0 or tried >= _NUM_RETRIES:
                    continue
                tried += 1
                if _runs_resized(model, inputs, kept, (dim, old, new)):
                    name, shape = _first_of_size(kept, dim, old)
                    return (
                        f"{type(model).__name__} keeps {name!r} from an earlier batch, with the "
                        f"shape {shape}, but this batch has {new} samples. Reset it before a "
                        "batch of another size (most models set it to None), or use batches "
                        "and micro-batches of one size only."
                    )
    return None


_Kept = tuple[str, nn.Module, str, list[torch.Tensor]]


def _kept_tensors(model: nn.Module) -> Iterator[_Kept]:
    """Yield the attributes of modules that hold tensors, which are no parameters."""
    for path, module in model.named_modules():
        for name, value in (*vars(module).items(), *module.named_buffers(recurse=False)):
            if name in _OF_EVERY_MODULE or not isinstance(value, (torch.Tensor, tuple, list, dict)):
                continue
            held = [leaf for leaf in leaves_of(value) if isinstance(leaf, torch.Tensor)]
            if any(leaf.ndim for leaf in held):
                yield f"{path}.{name}" if path else name, module, name, held


def _runs_resized(
    model: nn.Module, inputs: Any, kept: Sequence[_Kept], change: tuple[int, int, int]
) -> bool:
    """Whether the model runs if a dimension of the tensors that it keeps has another size."""
    dim, old, new = change

    def resized(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim <= dim or leaf.shape[dim] != old:
            return leaf
        rows = torch.arange(new, device=leaf.device) % old
        return leaf.detach().index_select(dim, rows)

    before = [(module, name, getattr(module, name)) for _, module, name, _ in kept]
    try:
        for module, name, value in before:
            setattr(module, name, map_leaves(resized, value))
        with torch.no_grad():
            _called(model, inputs)
    except Exception:  # noqa: BLE001 - the user's own code, and the first error is raised
        return False
    finally:
        for module, name, value in before:
            setattr(module, name, value)
    return True


def _first_of_size(kept: Sequence[_Kept], dim: int, size: int) -> tuple[str, tuple[int, ...]]:
    return next(
        (name, tuple(leaf.shape))
        for name, _, _, held in kept
        for leaf in held
        if leaf.ndim > dim and leaf.shape[dim] == size
    )


# --- inputs and targets -------------------------------------------------------------------------


def split_batch(
    batch: Any,
    *,
    num_inputs: int = 1,
    is_one_each: Callable[[int], bool] = lambda _index: False,
) -> tuple[Any, tuple[Any, ...]]:
    """Split a batch into the model's inputs and the loss's targets.

    Args:
        batch: A tuple or list of inputs and targets. Any other value is all inputs.
        num_inputs: The number of leading elements of a tuple or list that are inputs.
        is_one_each: Whether an element is a list with one entry for each sample. Such a list is one
            argument. Other lists are lists of arguments.

    Returns:
        The inputs, and the targets one by one.
    """
    if not isinstance(batch, (tuple, list)) or isinstance(batch, PackedSequence):
        return batch, ()
    inputs, targets = batch[:num_inputs], tuple(batch[num_inputs:])
    if _is_list(targets) and not is_one_each(num_inputs):
        targets = tuple(targets[0])
    if num_inputs == 1 and not (_is_list(inputs) and is_one_each(0)):
        return inputs[0], targets
    return tuple(inputs), targets


def _is_list(elements: tuple[Any, ...] | list[Any]) -> bool:
    first = elements[0] if len(elements) == 1 else None
    return isinstance(first, (tuple, list)) and not isinstance(first, PackedSequence)
