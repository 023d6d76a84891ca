"""Puts a user's objects back as they were.

Use `preserved` around a search on live objects, and `rewound` around a single pass through them. A
function `save_...` saves one kind of state, and returns a function that puts it back.
"""

from __future__ import annotations

import contextlib
import copy
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from memfit.errors import WorkloadError
from memfit.memory.attributes import save_contents
from memfit.memory.saved_tensor import SavedTensor, host_copy
from memfit.memory.switches import set_switches, switches

if TYPE_CHECKING:
    from types import FrameType

    from torch.optim import Optimizer

__all__ = [
    "Preserved",
    "preserved",
    "rewound",
    "save_random_states",
]

_T = TypeVar("_T")


class Preserved:
    """The modules' tensors that `preserved` has saved."""

    def __init__(self) -> None:
        self.tensors: list[SavedTensor] = []

    def release_replaced(self) -> None:
        """Release the device memory of tensors that a conversion has replaced since then.

        A model that was converted to another type or layout has new tensors on the device. The old
        ones are needed only at the end, when they are copied back from host memory.
        """
        for saved in self.tensors:
            saved.release_if_replaced()


@contextlib.contextmanager
def preserved(*modules: nn.Module, optimizer: Optimizer | None = None) -> Iterator[Preserved]:
    """Put back, bit for bit, everything that training steps change, even if they raise.

    What is put back:

    - parameters, buffers and gradients, also a gradient that is `None`, and which parameters are
      trained;
    - everything else that the modules keep (`memfit.memory.attributes`): training flags, lists,
      dictionaries, unregistered tensors, generators, objects of the model's own;
    - the optimizer's state and its groups;
    - the random states of Python, NumPy, torch and every initialised device;
    - global switches of torch.

    The values are kept in host memory, so that the trials have the whole device. Gradients are
    dropped in the block, and come back as new tensors with the same bits and layout. Parameters,
    buffers and optimizer state stay the same tensors.

    Args:
        *modules: The modules that take part in the step: the model, and a loss that has state.
        optimizer: The optimizer that takes the step.

    Yields:
        The saved tensors.

    Raises:
        WorkloadError: A module has parameters that are not initialised yet (a lazy module).
    """
    for module in modules:
        _refuse_lazy(module)
    restores: list[Callable[[], None]] = [save_random_states(), _save_switches()]
    kept = Preserved()
    restores.append(_save_modules(modules, kept))
    if optimizer is not None:
        restores.append(_save_optimizer(optimizer))
    try:
        yield kept
    finally:
        with _interrupt_deferred():
            for restore in reversed(restores):
                restore()


@contextlib.contextmanager
def rewound(*modules: nn.Module) -> Iterator[None]:
    """Put back what a forward pass changes besides gradients, so that passes can be compared.

    Buffers, everything else that the modules keep, and the random states are put back. Parameters
    and gradients stay as the pass left them.

    Args:
        *modules: The modules that take part.

    Yields:
        Nothing. Everything is saved when the block begins.
    """
    restores = [save_random_states(), _save_forward_state(modules)]
    try:
        yield
    finally:
        for restore in reversed(restores):
            restore()


def _refuse_lazy(module: nn.Module) -> None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise WorkloadError(
                f"{name!r} of {type(module).__name__} has no shape yet, because its "
                "module is lazy. Run one batch through the model first."
            )


@contextlib.contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """Delay Ctrl-C until the block has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[FrameType | None] = []
    previous = signal.signal(signal.SIGINT, lambda _signum, frame: caught.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if caught and callable(previous):
        previous(signal.SIGINT, caught[0])


def _save_modules(modules: Sequence[nn.Module], kept: Preserved) -> Callable[[], None]:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    buffers = [buffer for module in modules for buffer in module.buffers()]
    kept.tensors += [SavedTensor.of(tensor) for tensor in (*parameters, *buffers)]
    tensors = tuple(kept.tensors)
    put_contents_back = save_contents(modules, apart=(*parameters, *buffers))
    gradients = [
        (parameter, None if parameter.grad is None else host_copy(parameter.grad.detach()))
        for parameter in parameters
    ]
    is_trained = [(parameter, parameter.requires_grad) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None

    def restore() -> None:
        put_contents_back()
        for parameter, requires_grad in is_trained:
            parameter.requires_grad_(requires_grad)
        for saved in tensors:
            saved.restore()
        for parameter, gradient in gradients:
            parameter.grad = (
                None
                if gradient is None
                else torch.empty_like(
                    gradient, device=parameter.device, memory_format=torch.preserve_format
                ).copy_(gradient)
            )

    return restore


def _save_forward_state(modules: Sequence[nn.Module]) -> Callable[[], None]:
    parameters = [parameter for module in modules for parameter in module.parameters()]
    buffers = [buffer for module in modules for buffer in module.buffers()]
    tensors = [SavedTensor.of(buffer) for buffer in buffers]
    put_contents_back = save_contents(modules, apart=(*parameters, *buffers))

    def restore() -> None:
        put_contents_back()
        for saved in tensors:
            saved.restore()

    return restore


def _save_optimizer(optimizer: Optimizer) -> Callable[[], None]:
    state = {
        parameter: {name: _save_value(value) for name, value in values.items()}
        for parameter, values in optimizer.state.items()
    }
    groups = [
        {name: _save_value(value) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]

    def restore() -> None:
        optimizer.state.clear()
        for parameter, values in state.items():
            optimizer.state[parameter] = {name: value() for name, value in values.items()}
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            parameters = group["params"]
            group.clear()
            group["params"] = parameters
            group.update({name: value() for name, value in values.items()})

    return restore


def _save_value(value: _T) -> Callable[[], _T]:
    """Return a function that returns the saved value.

    A tensor is the same tensor with its old bits. Any other value is a copy.
    """
    if isinstance(value, torch.Tensor):
        saved = SavedTensor.of(value)
        return saved.restore  # type: ignore[return-value]
    kept = copy.deepcopy(value)
    return lambda: kept


def save_random_states() -> Callable[[], None]:
    """Save the random states of Python, NumPy, torch and every initialised device.

    Returns:
        A function that puts them back.
    """
    python_state = random.getstate()
    torch_state = torch.get_rng_state()
    device_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()

    def restore() -> None:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
        if device_states:
            torch.cuda.set_rng_state_all(device_states)
        if numpy is not None:
            numpy.random.set_state(numpy_state)

    return restore


def _save_switches() -> Callable[[], None]:
    before = switches()
    grad_enabled = torch.is_grad_enabled()

    def restore() -> None:
        set_switches(before)
        torch.set_grad_enabled(grad_enabled)

    return restore
