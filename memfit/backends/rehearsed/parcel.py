"""A training step on its way to the process that rehearses it.

The values of large parameters do not matter to a rehearsal, so they are left behind: the other side
makes parameters of zeros. What a user defined in a script or a notebook goes along by value.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import cloudpickle
import torch
from torch import nn

from memfit._torch_private import pytree
from memfit.errors import UnsupportedError
from memfit.step.training_step import TrainingStep

__all__ = ["packed", "unpacked"]

_LARGE = 2**16  # elements


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Leaves large weights behind, and puts what belongs to neither model nor batch on the card.

    The backend moves the model and its batches itself. Class weights of a loss, or the state of an
    optimizer, would stay on the CPU.
    """

    def __init__(self, parcel: io.BytesIO, step: TrainingStep) -> None:
        super().__init__(parcel)
        self._copies: list[torch.Tensor] = []
        self._moved_later: set[int] = set()
        if not isinstance(step.subject, str):
            model, batch = step.subject.model, step.subject.batch
            own = (*model.parameters(), *model.buffers(), *pytree.tree_leaves(batch))
            self._moved_later = {id(value) for value in own}

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is nn.Parameter and obj.numel() >= _LARGE and obj.layout is torch.strided:
            what = (obj.shape, obj.stride(), obj.dtype, obj.requires_grad)
            return _zeros, (*what, obj.__dict__ or None)
        is_plain = type(obj) in (torch.Tensor, nn.Parameter) and obj.layout is torch.strided
        if is_plain and obj.ndim and obj.device.type == "cpu" and id(obj) not in self._moved_later:
            copy = obj.detach().clone()
            # Alive until the parcel is packed, so that nothing else gets its id.
            self._copies.append(copy)
            self._moved_later.add(id(copy))
            return _placed, (copy, obj.requires_grad, isinstance(obj, nn.Parameter))
        return super().reducer_override(obj)


def _placed(tensor: torch.Tensor, requires_grad: bool, is_parameter: bool) -> torch.Tensor:
    placed = tensor.cuda() if torch.cuda.is_available() else tensor
    if is_parameter:
        return nn.Parameter(placed, requires_grad=requires_grad)
    return placed.requires_grad_(requires_grad)


def _zeros(
    shape: torch.Size,
    stride: tuple[int, ...],
    dtype: torch.dtype,
    requires_grad: bool,
    attributes: dict[str, Any] | None,
) -> nn.Parameter:
    values = torch.empty_strided(shape, stride, dtype=dtype).zero_()
    parameter = nn.Parameter(values, requires_grad=requires_grad)
    parameter.__dict__.update(attributes or {})
    return parameter


def packed(step: TrainingStep) -> bytes:
    """Return a training step as bytes.

    Raises:
        UnsupportedError: Something in it cannot leave this process.
    """
    parcel = io.BytesIO()
    try:
        _Pickler(parcel, step).dump(step)
    except Exception as error:
        raise UnsupportedError(
            f"{step.name} cannot be sent to the process that rehearses it ({error}). Simulate it "
            'with engine="simulate", or rehearse the script: memfit rehearse -- python script.py.'
        ) from error
    return parcel.getvalue()


def unpacked(parcel: bytes) -> TrainingStep:
    """Return the training step that `packed` made bytes of."""
    step = pickle.loads(parcel)  # noqa: S301 - our own bytes
    assert isinstance(step, TrainingStep)
    return step
