"""Says why a step cannot be simulated, which values it needs, and what to do instead."""

from __future__ import annotations

import contextlib
import dis
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer

from memfit._torch_private import is_compiled
from memfit.errors import NotSimulatedError
from memfit.simulation.schedule import StreamsDifferError

__all__ = ["META_ERRORS", "explained", "refuse_compiled", "refuse_sparse"]

META_ERRORS: Final = (NotImplementedError, RuntimeError, TypeError)
"""What torch raises if a meta tensor is asked for values, which it does not have.

`NotImplementedError` is for copies out of it (`.cpu()`, `.tolist()`) and for operations whose
output has a size that depends on values (a mask as an index, `nonzero`). `RuntimeError` is for
single numbers (`.item()`, a condition, `range`), and `TypeError` for NumPy and format strings.
"""

_TORCH: Final = Path(torch.__file__).parent
# These must not match "metadata" or the "meta" of meta-learning.
_OF_META: Final = re.compile(
    r"\bmeta (tensor|kernel|device|function|backend)|'meta'|\bmeta:0|(device|type)[= ]meta\b"
    r"|register_meta|\bmeta and |(, | and )meta\b",
    re.IGNORECASE,
)
_OF_VALUES: Final = re.compile(
    r"item\(\)|no data|data-dependent|data_ptr|data pointer|numpy|register_meta|is_nonzero|equal",
    re.IGNORECASE,
)
_OF_COMPILATION: Final = re.compile(r"no compiled frames|non-infra torch dispatch mode")
_TWO_DEVICES: Final = re.compile(
    r"same device|two devices|not on the expected device", re.IGNORECASE
)


@contextlib.contextmanager
def explained(model: nn.Module, name: str) -> Iterator[None]:
    """Turn an error of a meta tensor into a sentence that names the operation and the module.

    Args:
        model: The model that is traced.
        name: The name of the model in the sentence.

    Raises:
        NotSimulatedError: The block needed values or functions that the meta device lacks.
    """
    try:
        yield
    except META_ERRORS as error:
        reason = _reason(model, error)
        if reason is None:  # an error of the user's own code has the same types
            raise
        raise NotSimulatedError.because(name, reason) from error


@contextlib.contextmanager
def repeats(name: str) -> Iterator[None]:
    """Say in a sentence that the iterations of a step do not repeat.

    Args:
        name: The name of the model in the sentence.

    Raises:
        NotSimulatedError: No iteration stands for all that follow.
    """
    try:
        yield
    except StreamsDifferError as error:
        raise NotSimulatedError.because(
            name,
            (
                "its iterations never repeat what they allocate, so a few of them do not show "
                "what all of them need (does the step choose at random what it runs, alternate, "
                "or keep more in each iteration? Or does it loop over the samples of a batch?)"
            ),
        ) from error


def refuse_compiled(*parts: Any, name: str) -> None:
    """Refuse a step with parts that `torch.compile` or `torch.jit` has compiled.

    A simulation sees each operation of a step when it is called. Compiled operations are fused, and
    keep other tensors for backward.

    Args:
        *parts: The model, the loss, and the optimizer or the function that makes it.
        name: The name of the step in the sentence.

    Raises:
        NotSimulatedError: One of the parts, or something that it calls, is compiled.
    """
    for part in parts:
        compiled = _compiled_in(part)
        if compiled is not None:
            raise NotSimulatedError.because(
                name,
                (
                    f"{compiled}, and a simulation does not see the operations inside (give "
                    "the model without compiling it, or rehearse the compiled one)"
                ),
            )


def refuse_sparse(model: Any, *, name: str) -> None:
    """Refuse a model whose gradients are sparse.

    Args:
        model: A module.
        name: The name of the step in the sentence.

    Raises:
        NotSimulatedError: One of its embeddings makes sparse gradients.
    """
    for path, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise NotSimulatedError.because(
                name,
                f"{type(module).__name__} {path!r} makes sparse gradients, whose bytes depend on "
                "the rows that a batch names",
            )


def _compiled_in(part: Any) -> str | None:
    if not isinstance(part, nn.Module):
        return _compiled_function(part, "it")
    for path, module in part.named_modules():
        where = f"{type(module).__name__} {path!r}" if path else type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            return f"{where} is compiled (torch.jit)"
        if is_compiled(module):
            return f"{where} is compiled (torch.compile)"
        found = _compiled_function(module.forward, where, type(module))
        if found is not None:
            return found
    return None


def _compiled_function(function: Any, where: str, owner: type | None = None) -> str | None:
    if isinstance(function, torch.jit.ScriptFunction):
        return f"{where} is compiled (torch.jit)"
    if is_compiled(function):
        return f"{where} is compiled (torch.compile)"
    if isinstance(function, Optimizer):
        return _compiled_function(function.step, type(function).__name__)
    waiting, seen = [getattr(function, "__func__", function)], set()
    while waiting:
        plain = inspect.unwrap(waiting.pop())
        code = getattr(plain, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        for called in code.co_names:
            # A name is a global one, or one of the model's methods.
            for one in (plain.__globals__.get(called), getattr(owner, called, None)):
                if is_compiled(one):
                    return f"{where} calls {called}, which is compiled (torch.compile)"
                if inspect.isfunction(one) and not one.__module__.startswith("torch."):
                    waiting.append(one)
    return None


def _reason(model: nn.Module, error: BaseException) -> str | None:
    """Say why torch could not run a step without values; `None` for any other error."""
    if _was_raised_by_user(error.__traceback__):
        return None
    where = _innermost_part(model, error)
    said = str(error).strip().partition("\n")[0]
    if _OF_COMPILATION.search(str(error)):
        return (
            f"{where} runs compiled code (torch.compile), and a simulation does not "
            "see the operations inside"
        )
    if not _OF_META.search(str(error)):
        return None
    if _TWO_DEVICES.search(said):
        return (
            f"{where} uses a tensor on the CPU together with tensors on the card ({said}). "
            "Make it on the device of its inputs. Training on a GPU needs that too"
        )
    if _OF_VALUES.search(said):
        return f"{where} needs the values of its tensors ({said})"
    return f"{where} does something that only a real device can do ({said})"


def _was_raised_by_user(traceback: TracebackType | None) -> bool:
    """Whether the error comes from a `raise` outside of torch, and not from a call into C++."""
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    if Path(code.co_filename).is_relative_to(_TORCH):
        return False
    return code.co_code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _innermost_part(model: nn.Module, error: BaseException) -> str:
    """Return the name of the module or the optimizer that was running."""
    names = {id(module): name for name, module in model.named_modules()}
    found = "it"
    traceback = error.__traceback__
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            path = names[id(owner)]
            found = f"{type(owner).__name__} {path!r}" if path else type(owner).__name__
        elif isinstance(owner, Optimizer):
            found = f"the optimizer {type(owner).__name__}"
        traceback = traceback.tb_next
    return found
