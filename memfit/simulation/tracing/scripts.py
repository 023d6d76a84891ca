"""What a kernel takes from the allocator and gives back, in order.

An operation on meta tensors shows only its outputs. A kernel may take scratch memory before them,
between them and after them. A script says in which order. `memfit.simulation.tracing.recorder`
writes it down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch

from memfit.simulation.needs import Need

__all__ = [
    "ALONE",
    "OUTPUTS",
    "Drop",
    "Keep",
    "Make",
    "Release",
    "Script",
    "Workspace",
    "contiguous_copy",
]


class Release(Protocol):
    """What scripts ask of the kernels: torch's release."""

    @property
    def torch_release(self) -> tuple[int, int]:
        """The major and minor version of torch."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """Memory that a kernel takes while it runs. It is given back when the operation ends.

    Args:
        name: What the memory is for.
        num_bytes: Its size; 0 for a call that takes none.
        need: Its size, if it depends on the card or does not grow evenly with the batch size.
        is_needed: Whether the kernel needs it. If not, another kernel is used when there is no
            room.
        plan: The key under which cuDNN keeps its choice of an algorithm; `None` if there is no
            choice.
        tried: What is taken while plans are tried, besides; `None` for nothing.
        is_tf32: Whether it is another one on a card that computes fp32 as TF32.
    """

    name: str
    num_bytes: int = 0
    need: Need | None = None
    is_needed: bool = True
    plan: tuple[Any, ...] | None = None
    tried: Need | None = None
    is_tf32: bool = False

    @classmethod
    def copy_of(cls, tensor: torch.Tensor, name: str) -> Workspace:
        """Return the memory of a copy of a tensor, or of another tensor as large as it."""
        return cls(name=name, num_bytes=tensor.numel() * tensor.element_size())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Memory that a library takes at its first call in a thread, and keeps for all later ones.

    Args:
        name: What the memory is for.
        need: Its size on a card; 0 where the library keeps nothing.
    """

    name: str
    need: Need


@dataclasses.dataclass(frozen=True, slots=True)
class Drop:
    """The workspaces of these names are given back."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, *names: str) -> Drop:
        """Return a drop of workspaces, in this order."""
        return cls(names)

    @classmethod
    def all_of(cls, taken: Sequence[Workspace]) -> Drop:
        """Return a drop of what was taken, the last one first."""
        return cls(tuple(each.name for each in reversed(taken)))


@dataclasses.dataclass(frozen=True, slots=True)
class Make:
    """These outputs are allocated, by their index in the result."""

    indices: tuple[int, ...]


OUTPUTS: Final = Make(())
"""All outputs that were not made before are allocated, in the order of the result."""

Script = tuple["Workspace | Keep | Drop | Make", ...]

ALONE: Final[Script] = (OUTPUTS,)
"""The script of a kernel that takes nothing besides its outputs."""


def contiguous_copy(
    name: str, tensor: torch.Tensor, layout: torch.memory_format = torch.contiguous_format
) -> tuple[Workspace, ...]:
    """Return the copy of a tensor that is not contiguous in a layout; nothing for one that is."""
    if tensor.is_contiguous(memory_format=layout):
        return ()
    return (Workspace.copy_of(tensor, name),)
