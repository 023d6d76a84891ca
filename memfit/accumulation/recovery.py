"""Repeating an optimizer step from its beginning, in smaller micro-batches.

`StepStart` records the state that forward and backward passes change, apart from gradients.
`RetryMonitor` notices that the allocator has to free its cache again and again. `memfit.memory.oom`
decides whether an error means out of memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from memfit._torch_private import copy_each, version_of
from memfit.accumulation.held_objects import held_by
from memfit.errors import WorkloadError
from memfit.memory.attributes import save_held
from memfit.memory.restore import save_random_states

__all__ = ["RetryMonitor", "StepStart", "smaller"]

_log = logging.getLogger("memfit")

_MANY_STEPS: Final = 3
_NUM_SHOWING: Final = 3
_LEAST_TIMES_ROOM: Final = 4


def smaller(size: int, *, multiple_of: int = 1) -> int | None:
    """Return the micro-batch size to try after one ran out of memory.

    Args:
        size: Samples in the micro-batch that ran out of memory.
        multiple_of: The result is a multiple of this, if that is possible.

    Returns:
        Half of `size`, rounded down; `None` if there is no smaller size.
    """
    half = size // 2
    return half // multiple_of * multiple_of or half or None


class StepStart:
    """The state of a model and a loss at the beginning of a step, apart from gradients.

    Buffers are copied on their device, all at once, into memory that every step uses again. On a
    GPU this takes a few kernels, and the host does not wait. Parameters that forward changes
    (teachers, codebooks, a discriminator that the loss trains) are copied as well, into host
    memory. A parameter's first steps show whether it is one of these, so it is copied for them. One
    step does not show it, because a teacher begins as a copy of its student.

    Args:
        parts: The model, and the loss function.
    """

    def __init__(self, parts: Sequence[object]) -> None:
        held = [held_by(part) for part in parts]
        self._modules = tuple({id(m): m for modules, _ in held for m in modules}.values())
        self._others = tuple(other for _, others in held for other in others)
        self._buffers = _Copies()
        self._moving = _Copies(on_host=True)
        self._known: dict[int, torch.Tensor] = {}
        self._num_seen: dict[int, tuple[torch.Tensor, int]] = {}
        self._marks: list[tuple[torch.Tensor, tuple[int, int]]] = []
        self._gradients: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._restores: list[Callable[[], None]] = []

    def mark(self, dropped: Sequence[nn.Parameter]) -> None:
        """Record the state.

        Args:
            dropped: The parameters whose `.grad` is None now.

        Raises:
            WorkloadError: The model has lazy layers that have no parameters yet.
        """
        parameters = _unique(p for module in self._modules for p in module.parameters())
        buffers = _unique(b for module in self._modules for b in module.buffers())
        if any(is_lazy(tensor) for tensor in (*parameters, *buffers)):
            raise WorkloadError(
                "The model has lazy layers, whose parameters have no shape before the first batch. "
                "Run one batch through the model before the first step."
            )
        self._restores = [
            save_random_states(),
            save_held(self._modules, self._others, apart=(*parameters, *buffers)),
        ]
        self._buffers.take(buffers)
        new = [p for p in parameters if self._is_new(p)]
        has_room = bool(new) and _is_room_for(new)
        self._moving.take(
            [p for p in parameters if id(p) in self._known or (has_room and self._is_new(p))]
        )
        self._marks = [(p, (version_of(p), p.data_ptr())) for p in parameters]
        none_now = {id(p) for p in dropped}
        self._gradients = [
            (p, None if p.grad is None else p.grad.clone())
            for p in parameters
            if id(p) not in none_now
        ]

    def settle(self) -> None:
        """Record which parameters the passes have changed; the step succeeded and is kept."""
        moved = [*self._written(), *self._moving.changed(self._is_new)]
        self._known.update({id(parameter): parameter for parameter in moved})
        # The parameters are kept alive, so that no new one can get the id of a deleted one.
        self._num_seen = {
            id(p): (p, self._num_seen.get(id(p), (p, 0))[1] + 1) for p, _ in self._marks
        }
        self._moving.keep(lambda p: id(p) in self._known or self._is_new(p))
        self._restores, self._marks, self._gradients = [], [], []

    def rewind(self) -> None:
        """Restore the state, bit for bit."""
        lost = [p for p in self._written() if not self._moving.has(p)]
        for restore in self._restores:
            restore()
        with torch.no_grad():
            self._buffers.put_back()
            self._moving.put_back()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        if lost:
            self._known.update({id(p): p for p in lost})
            _log.warning(
                "Forward changed %d parameters that it had not changed before. The "
                "step is done again with the changed values",
                len(lost),
            )

    def _is_new(self, parameter: torch.Tensor) -> bool:
        """Whether too few steps have shown if forward changes a parameter."""
        return self._num_seen.get(id(parameter), (parameter, 0))[1] < _NUM_SHOWING

    def _written(self) -> list[torch.Tensor]:
        """Return the parameters that were changed since `mark`, as far as this can be seen."""
        return [p for p, mark in self._marks if (version_of(p), p.data_ptr()) != mark]


class _Copies:
    """Tensors and copies of their values.

    Args:
        on_host: Keep the copies in host memory.
    """

    def __init__(self, *, on_host: bool = False) -> None:
        self._on_host = on_host
        self._tensors: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []

    def take(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy tensors; if they are the same as before, use the memory of the old copies."""
        if not _are_same(tensors, self._tensors):
            self._copies = [self._room(tensor) for tensor in tensors]
        self._tensors = list(tensors)
        with torch.no_grad():
            if self._on_host:
                for copy, tensor in zip(self._copies, tensors, strict=True):
                    copy.copy_(tensor, non_blocking=copy.is_pinned())
            elif tensors:
                copy_each(self._copies, list(tensors))

    def put_back(self) -> None:
        """Write the copied values back into the tensors."""
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            there = copy.to(tensor.device)
            if (tensor.shape, tensor.dtype) != (copy.shape, copy.dtype):
                tensor.data = there.clone()
            # An unchanged tensor is left alone, because it may be a view that refuses writes.
            elif not torch.equal(tensor, there):
                tensor.copy_(there)

    def changed(self, is_asked: Callable[[torch.Tensor], bool]) -> list[torch.Tensor]:
        """Return the tensors whose values differ from their copies, of those that are asked for."""
        pairs = zip(self._tensors, self._copies, strict=True)
        asked = [(tensor, copy) for tensor, copy in pairs if is_asked(tensor)]
        return [tensor for tensor, copy in asked if not torch.equal(tensor, copy.to(tensor.device))]

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether there is a copy of a tensor."""
        return any(tensor is known for known in self._tensors)

    def keep(self, is_wanted: Callable[[torch.Tensor], bool]) -> None:
        """Drop the tensors and copies that are not wanted."""
        kept = [i for i, tensor in enumerate(self._tensors) if is_wanted(tensor)]
        self._tensors = [self._tensors[i] for i in kept]
        self._copies = [self._copies[i] for i in kept]

    def _room(self, tensor: torch.Tensor) -> torch.Tensor:
        data = tensor.detach()
        if not self._on_host or data.device.type == "cpu":
            return torch.empty_like(data)
        return torch.empty_like(data, device="cpu", pin_memory=True)


def _unique(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _are_same(tensors: Sequence[torch.Tensor], known: Sequence[torch.Tensor]) -> bool:
    return len(tensors) == len(known) and all(
        one is other and one.shape == other.shape for one, other in zip(tensors, known, strict=True)
    )


def _is_room_for(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether host memory has enough room for copies of tensors."""
    wanted = sum(tensor.nbytes for tensor in tensors)
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # this system does not tell
        return True
    return wanted * _LEAST_TIMES_ROOM <= available


class RetryMonitor:
    """Whether the allocator of a GPU had to free its cache in several steps in a row.

    Such steps fit, but they are very slow.

    Args:
        device: The device of training; only GPUs have such an allocator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._num_retries = self._now()
        self._num_steps = 0

    def is_repeated(self) -> bool:
        """Count a step that has ended; return whether too many steps in a row freed the cache."""
        num_retries, self._num_retries = self._num_retries, self._now()
        self._num_steps = self._num_steps + 1 if self._num_retries > num_retries else 0
        if self._num_steps < _MANY_STEPS:
            return False
        self._num_steps = 0
        return True

    def _now(self) -> int:
        if self._device is None:
            return 0
        return int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))
