"""Doing an optimizer step again from its beginning, in smaller micro-batches.

`StepStart` notes down what forward and backward passes change besides gradients. `RetryMonitor`
notices an allocator that has to give its cache back to go on. Whether an error was out of memory
is decided in `memfit.memory.oom`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from memfit._torch_private import copy_each
from memfit.memory.restore import save_attributes, save_random_states

__all__ = ["RetryMonitor", "StepStart", "smaller"]

_MANY_STEPS = 3


def smaller(size: int, *, multiple_of: int = 1) -> int | None:
    """Return the micro-batch to try after one that ran out.

    Args:
        size: Samples in the one that ran out.
        multiple_of: What it should be a multiple of, where that is possible.

    Returns:
        Half of it, rounded down; `None` where there is nothing less.
    """
    half = size // 2
    return half // multiple_of * multiple_of or half or None


class StepStart:
    """Buffers, plain attributes and random states as they were when a step began.

    Values of buffers are copied where they are, all at once, into memory that is used again for
    each step: a few kernels on a GPU, and nothing to wait for.

    Args:
        modules: The modules that take part in the step.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = tuple(modules)
        self._buffers: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []
        self._restores: list[Callable[[], None]] = []

    def mark(self) -> None:
        """Note everything down."""
        self._restores = [
            save_random_states(),
            *(save_attributes(module) for module in self._modules),
        ]
        buffers = [buffer for module in self._modules for buffer in module.buffers()]
        if _are_same(buffers, self._buffers):
            if buffers:
                with torch.no_grad():
                    copy_each(self._copies, buffers)
        else:
            self._copies = [buffer.detach().clone() for buffer in buffers]
        self._buffers = buffers

    def rewind(self) -> None:
        """Put everything back, bit for bit."""
        for restore in self._restores:
            restore()
        with torch.no_grad():
            for buffer, copy in zip(self._buffers, self._copies, strict=True):
                # One that was not written to may be a view that cannot be.
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)


def _are_same(buffers: list[torch.Tensor], known: list[torch.Tensor]) -> bool:
    return len(buffers) == len(known) and all(
        one is other and one.shape == other.shape for one, other in zip(buffers, known, strict=True)
    )


class RetryMonitor:
    """Whether the allocator of a GPU had to give back its cache in several steps in a row.

    Such steps fit, and crawl.

    Args:
        device: The device of training; others than GPUs have no such allocator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._num_retries = self._now()
        self._num_steps = 0

    def is_repeated(self) -> bool:
        """Take note of a step that has ended, and say whether it was one too many."""
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
