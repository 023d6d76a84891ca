"""One optimizer step on several ranks: counts are added up, and gradients are summed at the end.

`DistributedDataParallel` starts its all-reduces during the backward pass. A rank that runs out of
memory in that pass never starts them, and the other ranks would wait for ever. So if a step may be
repeated, every micro-batch runs inside `no_sync()`. Then the ranks agree on how the step ended.
They sum their gradients only if all have finished. This has a cost: once in each optimizer step,
the last backward pass does not overlap with communication.

In each attempt every rank calls the same collectives in the same order, whatever happens to it in
between: `summed`, `share_buffers`, `agree`, and then, if all have finished, `reduce`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from memfit._torch_private import copy_each
from memfit.errors import UnsupportedError, WorkloadError

__all__ = ["AttemptOutcome", "DistributedRanks", "Ranks", "SingleRank", "ranks_of"]

_BUCKET_BYTES = 25 * 1024**2  # the same as in DistributedDataParallel


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttemptOutcome:
    """How an attempt at an optimizer step ended: on one rank, or on all together.

    Args:
        micro_batch_size: The most samples in the next micro-batches; the smallest of all ranks'
            values is used, if all began with the same.
        planned_size: The most samples in a micro-batch when training began.
        ran_out: A micro-batch ran out of memory.
        failed: Something else went wrong, or there is no smaller size to try.
    """

    micro_batch_size: int
    planned_size: int
    ran_out: bool = False
    failed: bool = False


class Ranks(Protocol):
    """The ranks that take part in an optimizer step."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        ...

    @property
    def rank(self) -> int:
        """The number of this rank, from 0."""
        ...

    @property
    def is_first(self) -> bool:
        """Whether this rank reports for all ranks."""
        ...

    def summed(self, values: Sequence[float]) -> list[float]:
        """Return the sums of values over the ranks."""
        ...

    def share_buffers(self) -> None:
        """Give all ranks the first rank's buffers, if the model is set to do so."""
        ...

    def unsynchronised(self) -> contextlib.AbstractContextManager[object]:
        """Return the context for passes whose gradients stay with the rank."""
        ...

    def agree(self, ending: AttemptOutcome) -> AttemptOutcome:
        """Tell the other ranks how the attempt ended here; return how it ended for all."""
        ...

    def prepare(self) -> None:
        """Allocate the memory of `reduce`, while running out of memory can still be handled."""
        ...

    def reduce(self) -> None:
        """Sum gradients over the ranks."""
        ...

    def sum_tensor(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor of one number over the ranks."""
        ...


class SingleRank:
    """A process that trains without other ranks."""

    world_size = 1
    rank = 0
    is_first = True

    def summed(self, values: Sequence[float]) -> list[float]:
        """Return the values."""
        return list(values)

    def share_buffers(self) -> None:
        """Do nothing, because there is no other rank."""

    def unsynchronised(self) -> contextlib.AbstractContextManager[object]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()

    def agree(self, ending: AttemptOutcome) -> AttemptOutcome:
        """Return the argument."""
        return ending

    def prepare(self) -> None:
        """Do nothing, because `reduce` needs no memory."""

    def reduce(self) -> None:
        """Do nothing, because there is no other rank."""

    def sum_tensor(self, value: torch.Tensor) -> torch.Tensor:
        """Return the value."""
        return value


class DistributedRanks:
    """The ranks of a `DistributedDataParallel` model.

    Args:
        model: The model.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._model = model
        self._group = model.process_group
        self._first = distributed.get_global_rank(self._group, 0)
        ignored = getattr(model, "parameters_to_ignore", None) or set()
        self._parameters = [
            parameter
            for name, parameter in model.module.named_parameters()
            if parameter.requires_grad and name not in ignored
        ]
        self._device = self._parameters[0].device
        self._flat: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
        self._has_gradient: list[bool] = []
        # Allocated now, because later a rank may have no memory left.
        for tensors in (self._parameters, list(model.module.buffers())):
            for alike in _alike(tensors).values():
                self._bucket(alike)

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return int(self._group.size())

    @property
    def rank(self) -> int:
        """The number of this rank in the group."""
        return int(self._group.rank())

    @property
    def is_first(self) -> bool:
        """Whether this is the group's first rank."""
        return self.rank == 0

    def summed(self, values: Sequence[float]) -> list[float]:
        """Return the sums of values over the ranks."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        distributed.all_reduce(tensor, group=self._group)
        sums: list[float] = tensor.tolist()
        return sums

    def share_buffers(self) -> None:
        """Give all ranks the first rank's buffers, as the model's forward would.

        It is done here, because every rank calls this method. In the model's forward, the other
        ranks would wait for a rank that ran out of memory before it.
        """
        buffers = list(self._model.module.buffers())
        if self._model.broadcast_buffers and buffers:
            self._in_buckets(
                buffers,
                lambda flat: distributed.broadcast(flat, src=self._first, group=self._group),
            )
        self._model.require_forward_param_sync = False

    def unsynchronised(self) -> contextlib.AbstractContextManager[object]:
        """Return the model's `no_sync()`."""
        context: contextlib.AbstractContextManager[object] = self._model.no_sync()
        return context

    def agree(self, ending: AttemptOutcome) -> AttemptOutcome:
        """Tell the other ranks how the attempt ended here; return how it ended for all.

        Ranks that began with micro-batches of different sizes have different cards, so each of them
        keeps a size of its own.
        """
        planned = ending.planned_size
        message = [-ending.micro_batch_size, planned, -planned]
        message += [int(ending.ran_out), int(ending.failed)]
        message += map(int, self._has_gradient or [False] * len(self._parameters))
        tensor = torch.tensor(message, dtype=torch.int64, device=self._device)
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX, group=self._group)
        size, largest, smallest, ran_out, failed, *has_gradient = tensor.tolist()
        is_alike = largest == -smallest
        # The model's own next forward, for example in an evaluation, shares buffers again.
        self._model.require_forward_param_sync = True
        self._has_gradient = [bool(has) for has in has_gradient]
        return AttemptOutcome(
            micro_batch_size=-size if is_alike else ending.micro_batch_size,
            planned_size=planned,
            ran_out=bool(ran_out),
            failed=bool(failed),
        )

    def prepare(self) -> None:
        """Give every parameter that has no gradient on this rank a gradient of zeros.

        Raises:
            WorkloadError: A gradient is sparse.
        """
        self._has_gradient = [parameter.grad is not None for parameter in self._parameters]
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.is_sparse:
                raise WorkloadError(
                    "Only the model itself can sum sparse gradients over ranks. Give recover=False."
                )

    def reduce(self) -> None:
        """Sum gradients over the ranks; a `.grad` that no rank computed becomes None again."""
        for parameter, has in zip(self._parameters, self._has_gradient, strict=True):
            if not has:
                parameter.grad = None
        self._in_buckets(
            self._gradients(), lambda flat: distributed.all_reduce(flat, group=self._group)
        )

    def sum_tensor(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor of one number over the ranks."""
        total = value.clone()
        distributed.all_reduce(total, group=self._group)
        return total

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def _bucket(self, alike: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return a buffer that takes many tensors of one kind, or a piece of a large one."""
        like = alike[0]
        key = (like.dtype, like.device)
        total = sum(tensor.numel() for tensor in alike)
        wanted = max(
            min(total, _BUCKET_BYTES // like.element_size()),
            *(_largest_piece(tensor) for tensor in alike),
        )
        if key not in self._flat or self._flat[key].numel() < wanted:
            self._flat[key] = torch.empty(wanted, dtype=like.dtype, device=like.device)
        return self._flat[key]

    @torch.no_grad()
    def _in_buckets(
        self, tensors: Sequence[torch.Tensor], collective: Callable[[torch.Tensor], object]
    ) -> None:
        """Run a collective over many tensors at a time, in the same order on all ranks."""
        for alike in _alike(tensors).values():
            flat = self._bucket(alike)
            pending: list[tuple[torch.Tensor, torch.Tensor]] = []
            start = 0
            for piece in (piece for tensor in alike for piece in _pieces(tensor)):
                if start + piece.numel() > flat.numel():
                    _exchange(pending, flat[:start], collective)
                    pending, start = [], 0
                # Views of the bucket are contiguous, so strides may differ between ranks.
                pending.append((piece, flat[start : start + piece.numel()].view(piece.shape)))
                start += piece.numel()
            _exchange(pending, flat[:start], collective)


def _exchange(
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
    flat: torch.Tensor,
    collective: Callable[[torch.Tensor], object],
) -> None:
    tensors = [tensor for tensor, _ in pairs]
    views = [view for _, view in pairs]
    copy_each(views, tensors)
    collective(flat)
    copy_each(tensors, views)


def _alike(
    tensors: Sequence[torch.Tensor],
) -> dict[tuple[torch.dtype, torch.device], list[torch.Tensor]]:
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return groups


def _rows_per_piece(tensor: torch.Tensor) -> int:
    row_items = max(tensor[0].numel(), 1)
    return max(_BUCKET_BYTES // tensor.element_size() // row_items, 1)


def _pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cut a tensor along its rows so that each piece fits a bucket, or is one row."""
    if tensor.numel() * tensor.element_size() <= _BUCKET_BYTES:
        return (tensor,)
    return torch.split(tensor, _rows_per_piece(tensor))


def _largest_piece(tensor: torch.Tensor) -> int:
    if tensor.numel() * tensor.element_size() <= _BUCKET_BYTES:
        return tensor.numel()
    return _rows_per_piece(tensor) * tensor[0].numel()


def ranks_of(model: nn.Module) -> Ranks:
    """Return the ranks that train a model.

    Args:
        model: The model, as the training loop calls it.

    Raises:
        UnsupportedError: Its parameters are sharded over ranks.
    """
    inner = getattr(model, "_orig_mod", model)  # torch.compile keeps the original here
    if isinstance(inner, DistributedDataParallel):
        return DistributedRanks(inner)
    if distributed.is_available() and distributed.is_initialized() and _is_sharded(model):
        raise UnsupportedError(
            "The model's parameters are sharded over ranks (FSDP), but Accumulator "
            "works with DistributedDataParallel models only. Use "
            "memfit.micro_batches in your own loop."
        )
    return SingleRank()


def _is_sharded(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(
        isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules()
    )
