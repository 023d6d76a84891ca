"""LSTM, GRU and plain recurrent layers as cuDNN runs them: one operation with a reserve.

On the meta device, PyTorch runs these layers one time step at a time and keeps every intermediate
tensor. On CUDA, cuDNN runs the whole sequence at once and keeps one opaque buffer for backward.
Sequences of different lengths (`PackedSequence`) are not changed.

Source: aten/src/ATen/native/cudnn/RNN.cpp, and aten/src/ATen/cudnn/AutocastRNN.cpp for the casts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from memfit._torch_private import aten, storage_id
from memfit.errors import NotSimulatedError
from memfit.simulation.tracing.releases import cudnn_version
from memfit.simulation.tracing.scripts import Drop, Make, Script, Workspace, contiguous_copy

__all__ = [
    "RECURRENT",
    "Recurrence",
    "is_padded",
    "join_weights",
    "on_cuda",
    "recur",
    "recur_backward",
    "recurrent_backward_script",
    "recurrent_script",
]

RECURRENT: Final = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}
"""torch's names of the layers, and cuDNN's number for each (`cudnnRNNMode_t`)."""

_LSTM: Final = RECURRENT["lstm"]
_NUM_GATES: Final = (1, 1, 4, 3)
_NUM_KEPT: Final = (1, 1, 5, 6)
_NUM_ARGUMENTS: Final = 9
_OF_CUDNN: Final = frozenset((torch.float16, torch.float32, torch.float64))
# Source: `supportsBFloat16RNNWithCuDNN` in aten/src/ATen/cuda/detail/CUDAHooks.cpp.
_FIRST_WITH_BFLOAT16: Final = 91300
# Autocast always casts to this type for cuDNN, also where all else is bfloat16 (AutocastRNN.cpp).
_AUTOCAST_DTYPE: Final = torch.float16


def is_padded(args: tuple[Any, ...]) -> bool:
    """Whether a recurrent layer is called on one tensor, not on a `PackedSequence`."""
    return len(args) == _NUM_ARGUMENTS and isinstance(args[3], bool)


def recur(  # noqa: PLR0917 - the signature of what it stands in for
    name: str,
    is_autocast: bool,
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
        is_autocast: Whether autocast casts the arguments.
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

    Raises:
        NotSimulatedError: This cuDNN does not have the layer.
    """
    is_older = (cudnn_version() or _FIRST_WITH_BFLOAT16) < _FIRST_WITH_BFLOAT16
    if data.dtype is torch.bfloat16 and is_older:
        raise NotSimulatedError.because(
            "A recurrent layer in bfloat16",
            "cuDNN has it since 9.13, and with an older one torch runs it step by step",
        )
    mode = RECURRENT[name]
    hidden, cell = states if mode == _LSTM else (states, None)
    if is_autocast:
        if weights[0].dtype is not _AUTOCAST_DTYPE:
            weights = _Flattened.apply(*weights)
        # The C++ compiler evaluates the arguments from the last one to the first.
        cell = None if cell is None else cell.to(_AUTOCAST_DTYPE)
        hidden, data = hidden.to(_AUTOCAST_DTYPE), data.to(_AUTOCAST_DTYPE)
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


def join_weights(model: nn.Module) -> None:
    """Give the weights of each recurrent layer one storage, as `flatten_parameters` does on CUDA.

    Args:
        model: A model on the meta device.
    """
    for module in model.modules():
        if not isinstance(module, nn.RNNBase):
            continue
        weights = [weight for layer in module.all_weights for weight in layer]
        dtypes = {weight.dtype for weight in weights}
        # Computed weights, and a weight that the layer has twice, stay as they are.
        are_plain = all(isinstance(weight, nn.Parameter) for weight in weights)
        are_different = len(set(map(id, weights))) == len(weights)
        if are_plain and are_different and len(dtypes) == 1 and dtypes <= _OF_CUDNN:
            parts = _in_one_buffer(weights[0].data, weights)
            for weight, part in zip(weights, parts, strict=True):
                weight.data = part


class _Flattened(torch.autograd.Function):
    """Casts weights into one buffer. Their gradients are cast back, the last one first."""

    @staticmethod
    def forward(ctx: Any, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.dtypes = [weight.dtype for weight in weights]
        return tuple(_in_one_buffer(weights[0].new_empty(0, dtype=_AUTOCAST_DTYPE), weights))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        pairs = zip(reversed(gradients), reversed(ctx.dtypes), strict=True)
        cast = [None if gradient is None else gradient.to(dtype) for gradient, dtype in pairs]
        return tuple(reversed(cast))


def _in_one_buffer(like: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors of the shapes of weights, next to one another in one storage."""
    sizes = [weight.numel() for weight in weights]
    parts = like.new_empty(sum(sizes)).split(sizes)
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


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
    def workspace(self) -> Workspace:
        """What each call takes, for transposed weights and some states of every layer."""
        states = self.layers * (3 * _NUM_GATES[self.mode] - 1)
        num_bytes = self.weights * self.item_bytes + self._state_bytes * states
        return Workspace(name="recurrent layer", num_bytes=num_bytes)

    @property
    def _state_bytes(self) -> int:
        return self.samples * self.hidden * self.directions * self.item_bytes


def on_cuda(args: tuple[Any, ...], result: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the result of `_cudnn_rnn` with the layout and the buffers that it has on CUDA.

    Weights that are not next to one another (in bfloat16, or shared) are copied at each call.

    Args:
        args: The operation's arguments.
        result: The result on the meta device, where the reserve is empty.
    """
    data, weights, options, is_trained = args[0], args[1], args[6:14], args[12]
    output, hidden, cell, reserve, joined = result
    output = _made_steps_first(output, options)
    if is_trained:
        num_bytes = Recurrence.of(data, weights, options).reserve_bytes
        reserve = data.new_empty(num_bytes, dtype=torch.uint8)
    if len({storage_id(weight.untyped_storage()) for weight in weights}) > 1:
        joined = data.new_empty(sum(weight.numel() for weight in weights))
    return output, hidden, cell, reserve, joined


def recur_backward(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the gradients of `_cudnn_rnn_backward`, which the meta device does not implement.

    Args:
        args: The operation's arguments: input, weights, their stride, their buffer, the states, ...

    Returns:
        The gradients of the input, of the states and of the weights. The gradients of the weights
        are views of one buffer.
    """
    data, weights, _, _, hidden, cell = args[:6]
    is_trained = args[-1][3]
    return (
        _made_steps_first(data, args[10:18]),
        torch.empty_like(hidden),
        None if cell is None else torch.empty_like(cell),
        _in_one_buffer(data, weights) if is_trained else [None] * len(weights),
    )


def recurrent_script(args: tuple[Any, ...]) -> Script:
    """Return what `_cudnn_rnn` takes, in order: the reserve comes after the workspace.

    Args:
        args: The operation's arguments.
    """
    data, weights, options = args[0], args[1], args[6:14]
    copied = _steps_first("input, steps first", data, options)
    workspace = Recurrence.of(data, weights, options).workspace
    return (*copied, Make((0, 1, 2, 4)), workspace, Make((3,)), _dropped(workspace, *copied))


def recurrent_backward_script(args: tuple[Any, ...]) -> Script:
    """Return what `_cudnn_rnn_backward` takes, in order: first for the input, then for the weights.

    Args:
        args: The operation's arguments.
    """
    data, weights, options, is_trained = args[0], args[1], args[10:18], args[-1][3]
    states = zip(args[4:6], args[8:10], strict=True)
    zeros = tuple(
        Workspace.copy_of(state, f"gradient of last state {index}")
        for index, (state, gradient) in enumerate(states)
        if state is not None and gradient is None
    )
    copied = _steps_first("input, steps first", data, options)
    gradient = _steps_first("gradient, steps first", args[7], options)
    workspace = Recurrence.of(data, weights, options).workspace
    of_weights: Script = (*copied, Make((3,)), workspace, _dropped(workspace, *copied))
    return (
        *zeros,
        *copied,
        *gradient,
        Make((0, 1, 2)),
        workspace,
        _dropped(workspace, *gradient, *copied),
        *(of_weights if is_trained else ()),
    )


def _made_steps_first(like: torch.Tensor, options: Sequence[Any]) -> torch.Tensor:
    """Return a sequence as cuDNN writes it: its steps come first in memory, in either order."""
    if not options[4]:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    samples, steps, width = like.shape
    return like.new_empty(steps, samples, width).transpose(0, 1)


def _steps_first(
    name: str, tensor: torch.Tensor | None, options: Sequence[Any]
) -> tuple[Workspace, ...]:
    """Return the copy that cuDNN needs of a sequence; nothing for one with its steps first.

    Source: `input.transpose(0, 1)` and `.contiguous()` in aten/src/ATen/native/cudnn/RNN.cpp.
    """
    if tensor is None:
        return ()
    is_batch_first = options[4]
    return contiguous_copy(name, tensor.transpose(0, 1) if is_batch_first else tensor)


def _dropped(*workspaces: Workspace) -> Drop:
    return Drop.of(*(workspace.name for workspace in workspaces))
