"""Putting a user's objects back as they were.

`preserved` brackets a search on live objects, `rewound` a single pass through them; `save_...` note
down one kind of state for those who bracket in their own way.
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
    """What `preserved` has noted down of the modules' tensors."""

    def __init__(self) -> None:
        self.tensors: list[SavedTensor] = []

    def release_replaced(self) -> None:
        """Give back the device memory of tensors that a conversion has replaced meanwhile.

        A model that was converted to another type or layout has other tensors on the device; the
        old ones are needed only at the end, and then come back from host memory.
        """
        for saved in self.tensors:
            saved.release_if_replaced()


@contextlib.contextmanager
def preserved(*modules: nn.Module, optimizer: Optimizer | None = None) -> Iterator[Preserved]:
    """Put everything that training steps change back as it was, bit for bit, however they end.

    Covers parameters, buffers, gradients (also those that are `None`), whatever else the modules
    keep (`memfit.memory.attributes`: training flags, lists, dictionaries, unregistered tensors,
    generators, objects of the model's own), the optimizer's state and its groups, the random states
    of Python, NumPy, torch and every initialised device, and global switches of torch. The values
    wait in host memory, so that the device has its room for the trials. Gradients are dropped
    meanwhile, and come back as new tensors of the same bits and layout; parameters, buffers and
    optimizer state keep their identity.

    Args:
        *modules: The modules that take part in the step: the model, and a loss that has state.
        optimizer: The optimizer that takes the step.

    Yields:
        What was noted down, once all of it was.

    Raises:
        WorkloadError: A module has parameters that are not materialised yet.
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

    Covers buffers, whatever else the modules keep, and the random states. Parameters and gradients
    stay as the pass left them.

    Args:
        *modules: The modules that take part.

    Yields:
        Once everything is noted down.
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
                f"{name!r} of {type(module).__name__} has no shape yet (a lazy module): run one "
                "batch through the model first."
            )


@contextlib.contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done, then let it act."""
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
    for parameter in parameters:
        parameter.grad = None

    def restore() -> None:
        put_contents_back()
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
    """Return what gives the value back: a tensor itself with its bits, anything else a copy."""
    if isinstance(value, torch.Tensor):
        saved = SavedTensor.of(value)
        return saved.restore  # type: ignore[return-value]
    kept = copy.deepcopy(value)
    return lambda: kept


def save_random_states() -> Callable[[], None]:
    """Note down the random states of Python, NumPy, torch and every initialised device.

    Returns:
        What puts them back.
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
    cudnn = torch.backends.cudnn
    cudnn_flags = (cudnn.enabled, cudnn.benchmark, cudnn.deterministic)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    grad_enabled = torch.is_grad_enabled()
    default_dtype = torch.get_default_dtype()

    def restore() -> None:
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = cudnn_flags
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.set_grad_enabled(grad_enabled)
        torch.set_default_dtype(default_dtype)

    return restore
