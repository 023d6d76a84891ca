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

from memfit.errors import UnsupportedError
from memfit.step.workload import TrainingStep

__all__ = ["packed", "unpacked"]

_LARGE = 2**16  # elements


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is nn.Parameter and obj.numel() >= _LARGE and obj.layout is torch.strided:
            what = (obj.shape, obj.stride(), obj.dtype, obj.requires_grad)
            return _zeros, (*what, obj.__dict__ or None)
        return super().reducer_override(obj)


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
        _Pickler(parcel).dump(step)
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
