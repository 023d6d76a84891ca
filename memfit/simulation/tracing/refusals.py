"""Says in one sentence why a step cannot be simulated: what needs which values, and the way out."""

from __future__ import annotations

import contextlib
import dis
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from torch import nn

from memfit.errors import NotSimulatedError
from memfit.simulation.schedule import StreamsDifferError

__all__ = ["explained"]

_TORCH: Final = Path(torch.__file__).parent
# Not "metadata", and not the meta of somebody's meta-learning.
_OF_META: Final = re.compile(
    r"\bmeta (tensor|kernel|device|function|backend)|'meta'|\bmeta:0|(device|type)[= ]meta\b"
    r"|register_meta|\bmeta and |(, | and )meta\b",
    re.IGNORECASE,
)
_TWO_DEVICES: Final = re.compile(
    r"same device|two devices|not on the expected device", re.IGNORECASE
)


@contextlib.contextmanager
def explained(model: nn.Module, name: str) -> Iterator[None]:
    """Turn what a meta tensor cannot do into a sentence that names the operation and the module.

    Args:
        model: The model that is traced.
        name: What the sentence calls it.

    Raises:
        NotSimulatedError: The block needed what the meta device does not have.
    """
    try:
        yield
    except StreamsDifferError as error:
        raise NotSimulatedError.because(
            name,
            "its iterations never repeat what they allocate, so that no few of them stand for all "
            "(does it draw what it computes from a generator of its own, or alternate?)",
        ) from error
    except (NotImplementedError, RuntimeError, TypeError) as error:
        if not _is_about_meta(error):
            raise
        where = _innermost_module(model, error)
        said = str(error).strip().splitlines()[0]
        if _TWO_DEVICES.search(said):
            reason = (
                f"{where} takes a tensor of the CPU beside those of the card ({said}); make it on "
                "the device of its inputs, as training on a GPU needs it too"
            )
        else:
            reason = f"{where} needs the values of its tensors ({said})"
        raise NotSimulatedError.because(name, reason) from error


def _is_about_meta(error: BaseException) -> bool:
    """Whether torch raised it, about a tensor without values; a user's own error is the user's."""
    return not _was_raised_by_user(error.__traceback__) and bool(_OF_META.search(str(error)))


def _was_raised_by_user(traceback: TracebackType | None) -> bool:
    """Whether the innermost frame is a `raise` outside of torch, and not a call into C++."""
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    if Path(code.co_filename).is_relative_to(_TORCH):
        return False
    return code.co_code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _innermost_module(model: nn.Module, error: BaseException) -> str:
    names = {id(module): name for name, module in model.named_modules()}
    found = "it"
    traceback = error.__traceback__
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            path = names[id(owner)]
            found = f"{type(owner).__name__} {path!r}" if path else type(owner).__name__
        traceback = traceback.tb_next
    return found
