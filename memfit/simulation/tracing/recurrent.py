"""LSTM, GRU and plain recurrent layers as cuDNN runs them: one operation with a reserve.

On the meta device, PyTorch runs these layers one time step at a time and keeps every intermediate
tensor. On CUDA, cuDNN runs the whole sequence at once and keeps one opaque buffer for backward.
Sequences of different lengths (`PackedSequence`) are not changed.

Source: aten/src/ATen/native/cudnn/RNN.cpp, and aten/src/ATen/cudnn/AutocastRNN.cpp for the casts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Final

import torch

from memfit._torch_private import aten

__all__ = ["RECURRENT", "Recurrence", "is_padded", "recur", "recur_backward", "with_reserve"]

RECURRENT: Final = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}
"""torch's names of the layers, and cuDNN's number for each (`cudnnRNNMode_t`)."""

_LSTM: Final = RECURRENT["lstm"]
_NUM_GATES: Final = (1, 1, 4, 3)
_NUM_KEPT: Final = (1, 1, 5, 6)
_NUM_ARGUMENTS: Final = 9


def is_padded(args: tuple[Any, ...]) -> bool:
    """Whether a recurrent layer is called on one tensor, not on a `PackedSequence`."""
    return len(args) == _NUM_ARGUMENTS and isinstance(args[3], bool)


def recur(  # noqa: PLR0917 - the signature of what it stands in for
    name: str,
    dtype: torch.dtype | None,
    data: torch.Tensor,
    states: Any,
    weights: Sequence[torch.Tensor],
    _has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """Run a recurrent layer as one operation of cuDNN.

    Args:
        name: One of `RECURRENT`.
        dtype: The type that autocast casts to; `None` outside of autocast.
        data: Shape (steps, samples, features), or samples first.
        states: The initial hidden state, of shape (layers x directions, samples, hidden). For an
            LSTM, also the initial cell state.
        weights: The weights of each layer and direction in turn.
        num_layers: The number of layers.
        dropout: The dropout between layers.
        train: Whether backward follows.
        bidirectional: Whether each layer runs in both directions.
        batch_first: Whether samples come first in `data`.

    Returns:
        The output and the last states, as `torch.lstm` returns them.
    """
    mode = RECURRENT[name]
    hidden, cell = states if mode == _LSTM else (states, None)
    if dtype is not None:
        data, hidden = data.to(dtype), hidden.to(dtype)
        cell = None if cell is None else cell.to(dtype)
        weights = [weight.to(dtype) for weight in weights]
    directions = 2 if bidirectional else 1
    projection = hidden.shape[-1] if cell is not None and hidden.shape != cell.shape else 0
    output, last_hidden, last_cell, _, _ = aten("_cudnn_rnn.default")(
        data,
        list(weights),
        len(weights) // (num_layers * directions),
        # On CUDA the parameters are views of one buffer. Here any parameter takes its place.
        weights[0].detach(),
        hidden,
        cell,
        mode,
        (hidden if cell is None else cell).shape[-1],
        projection,
        num_layers,
        batch_first,
        dropout,
        train,
        bidirectional,
        [],
        None,
    )
    return (output, last_hidden) if cell is None else (output, last_hidden, last_cell)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recurrence:
    """What cuDNN's memory for a recurrent layer depends on.

    Args:
        mode: cuDNN's number for the kind of layer.
        steps: The length of the sequences.
        samples: The number of sequences.
        hidden: The width of a layer's state in one direction.
        layers: The number of layers.
        directions: 1 or 2.
        weights: The number of elements in all weight matrices.
        item_bytes: Bytes of an element.

    Source: pytorch/pytorch#2895, where cuDNN asked for these bytes on a Tesla P100 in fp32, for
        layers 4 x 320 wide, 123 features and 25,000 steps in all: an LSTM 736,000,000 of reserve
        and 17,730,560 of workspace, a GRU 864,000,000 and 13,169,920.
    """

    mode: int
    steps: int
    samples: int
    hidden: int
    layers: int
    directions: int
    weights: int
    item_bytes: int

    @classmethod
    def of(
        cls, data: torch.Tensor, weights: Sequence[torch.Tensor], options: Sequence[Any]
    ) -> Recurrence:
        """Read these values from an operation's arguments.

        Args:
            data: The input.
            weights: The weights of all layers.
            options: The arguments from `mode` to `bidirectional`.
        """
        mode, hidden, _, layers, batch_first, _, _, bidirectional = options
        samples, steps = data.shape[:2] if batch_first else data.shape[1::-1]
        return cls(
            mode=mode,
            steps=steps,
            samples=samples,
            hidden=hidden,
            layers=layers,
            directions=2 if bidirectional else 1,
            weights=sum(weight.numel() for weight in weights if weight.ndim > 1),
            item_bytes=data.element_size(),
        )

    @property
    def reserve_bytes(self) -> int:
        """Bytes that are kept for backward besides the tensors that the operation returns.

        For each time step, an LSTM keeps four gates and the cell's state, a GRU keeps six tensors
        of that size, and a plain layer keeps its activation. Each layer but the last also keeps its
        output, which the next layer reads.
        """
        states = self.layers * _NUM_KEPT[self.mode] + self.layers - 1
        return self.steps * self._state_bytes * states

    @property
    def workspace_bytes(self) -> int:
        """Bytes that each call takes, for transposed weights and some states of every layer."""
        states = self.layers * (3 * _NUM_GATES[self.mode] - 1)
        return self.weights * self.item_bytes + self._state_bytes * states

    @property
    def _state_bytes(self) -> int:
        return self.samples * self.hidden * self.directions * self.item_bytes


def with_reserve(args: tuple[Any, ...], result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the result of `_cudnn_rnn` with the reserve that it has on CUDA.

    Args:
        args: The operation's arguments.
        result: The result on the meta device, where the reserve is empty.
    """
    data, is_trained = args[0], args[12]
    if not is_trained:
        return result
    num_bytes = Recurrence.of(data, args[1], args[6:14]).reserve_bytes
    return (*result[:3], data.new_empty(num_bytes, dtype=torch.uint8), *result[4:])


def recur_backward(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the gradients of `_cudnn_rnn_backward`, which the meta device does not implement.

    Args:
        args: The operation's arguments: input, weights, their stride, their buffer, the states, ...

    Returns:
        The gradients of the input, of the states and of the weights. The gradients of the weights
        are views of one buffer.
    """
    data, weights, _, _, hidden, cell = args[:6]
    needed = args[-1]
    gradients: list[torch.Tensor | None] = [None] * len(weights)
    if needed[3]:
        flat = data.new_empty(sum(weight.numel() for weight in weights))
        start = 0
        for index, weight in enumerate(weights):
            end = start + math.prod(weight.shape)
            gradients[index] = flat[start:end].view(weight.shape)
            start = end
    return (
        torch.empty_like(data, memory_format=torch.contiguous_format),
        torch.empty_like(hidden),
        None if cell is None else torch.empty_like(cell),
        gradients,
    )
