"""Makes the model of a step one rank of many: DistributedDataParallel, or shards of FSDP2.

The other ranks have no process. This works only on a rehearsed card, whose collectives act as if
every rank held what this one holds.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from memfit.errors import UnsupportedError, WorkloadError
from memfit.step.checkpointing import blocks_of

__all__ = ["Replicated", "check_all_used", "join_ranks", "shard"]

_NUM_NAMED = 3


def join_ranks(world_size: int, device: torch.device) -> None:
    """Make this process the first of many ranks, if it is not that already.

    Args:
        world_size: The number of ranks.
        device: The rehearsed card.

    Raises:
        UnsupportedError: This torch is built without `torch.distributed`.
    """
    if not distributed.is_available():
        raise UnsupportedError(
            f"torch {torch.__version__} is built without torch.distributed, so no rank can be "
            "rehearsed. Install another build of torch."
        )
    if distributed.is_initialized():
        if distributed.get_world_size() == world_size:
            return
        distributed.destroy_process_group()
    # NCCL's monitor would wait for the other ranks in the store.
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group(
        "nccl",
        store=store,
        rank=0,
        world_size=world_size,
        device_id=torch.device(device.type, torch.cuda.current_device()),
    )


class Replicated:
    """A model with a `DistributedDataParallel` around it, made anew for every trial.

    After a backward that ran out of memory, the wrapper would wait for the rest of it.

    Args:
        model: The model, on its device.
        device: The device.
        has_views: Gradients are views of the buckets (`gradient_as_bucket_view`).
    """

    def __init__(self, model: nn.Module, device: torch.device, *, has_views: bool) -> None:
        self._model = model
        self._device = device
        self._has_views = has_views
        self._wrapper: DistributedDataParallel | None = None

    @property
    def module(self) -> DistributedDataParallel:
        """The module to call in place of the model."""
        if self._wrapper is None:
            self._wrapper = DistributedDataParallel(
                self._model,
                device_ids=[self._device],
                gradient_as_bucket_view=self._has_views,
            )
        return self._wrapper

    @contextlib.contextmanager
    def unsynchronised(self) -> Iterator[None]:
        """Keep the gradients of the block's backward passes on this rank."""
        with self.module.no_sync():
            yield

    def forget(self) -> None:
        """Drop the wrapper with its buckets."""
        self._wrapper = None


def check_all_used(model: nn.Module) -> None:
    """Refuse a model with parameters that got no gradient, as the wrapper would in the next step.

    Args:
        model: The model, after a backward pass.

    Raises:
        WorkloadError: A parameter that is trained has no gradient.
    """
    unused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    if unused:
        raise WorkloadError(
            f"The loss does not use {', '.join(unused[:_NUM_NAMED])}"
            f"{' and others' if len(unused) > _NUM_NAMED else ''}, and DistributedDataParallel "
            "refuses parameters without a gradient: freeze them (frozen), rehearse a script that "
            "gives it find_unused_parameters=True, or give the engine 'simulate', which tries one "
            "process alone."
        )


def shard(model: nn.Module, world_size: int, device: torch.device) -> None:
    """Shard a model in place with FSDP2: each block by itself, and the rest of the model.

    The model may still be in host memory. Then one block at a time is on the device as a whole.

    Args:
        model: The model.
        world_size: The number of ranks.
        device: The device on which the shards will be.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size,))
    for name in blocks_of(model):
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
