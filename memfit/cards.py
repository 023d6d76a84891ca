"""A catalogue of graphics cards: what torch sees of their memory, and what a process takes of it.

The figures are in `cards.csv` beside this module, each with its source. Nothing here asks a driver
or measures. The `cuda` backend says what a card that is there really has.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Iterable
from importlib import resources

from memfit.errors import UsageError
from memfit.records import Record
from memfit.units import GIB, MIB, format_bytes

__all__ = [
    "ANY_GPU",
    "COMMON_GPUS",
    "REHEARSED_CARD_VARIABLE",
    "Gpu",
    "catalogue",
    "each_once",
    "find_gpu",
    "gpu_like",
    "gpu_with",
    "is_rehearsed",
    "oldest_cudnn",
]

COMMON_GPUS = (
    "NVIDIA GeForce RTX 3070",
    "NVIDIA GeForce RTX 2080 Ti",
    "NVIDIA GeForce RTX 3060",
    "Tesla T4",
    "NVIDIA GeForce RTX 4080",
    "NVIDIA L4",
    "NVIDIA GeForce RTX 3090",
    "NVIDIA GeForce RTX 4090",
    "NVIDIA GeForce RTX 5090",
    "NVIDIA A100-SXM4-40GB",
    "NVIDIA H100 80GB HBM3",
    "NVIDIA H200",
)
"""The common cards, 8 to 141 GB, that are simulated where there is no GPU and no card is named."""

REHEARSED_CARD_VARIABLE = "MEMFIT_REHEARSED_CARD"
"""The environment variable that describes a rehearsed card to the device that stands in for it."""

ANY_GPU = "any"
"""A card of which only the capacity matters; it behaves like compute capability 8.0."""

_CONTEXT_BANDS = ((48, 165), (99, 280), (10_000, 450))
"""Up to so many multiprocessors, so many MiB of context.

Source: bands through public measurements, see `Gpu.context_bytes`.
"""
_CONTEXT_RANGES = {
    165: (120, 210),
    280: (220, 340),
    450: (400, 510),
    600: (520, 764),
    660: (600, 720),
}
"""For each estimate in MiB, the least and the most that NVIDIA's cards of that kind held.

Source: out-of-memory messages in public issues, of torch 2.0 and later with one process: what the
    process has, less what the allocator reserved. Bands of one to four samples each. The H100 was
    measured with benchmarks/contexts.py: a process that trains holds 758 to 764 MiB.
"""
_WORKSPACE_BYTES = 8_519_680  # :4096:2:16:8
_WORKSPACE_LARGE_BYTES = 32 * MIB
_WORKSPACE_GFX94_BYTES = 128 * MIB
_LARGE_ON_BLACKWELL = (2, 12)
_NEWEST = (2, 15)
_TURING = (7, 5)
_SMALL_AMPERE = ((8, 6), (8, 7), (8, 9))
_SMALL_BLACKWELL = (12,)
_LARGE_BLACKWELL = (10, 0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gpu(Record):
    """A card, or a slice of one.

    Args:
        name: As `torch.cuda.get_device_name` prints it.
        aliases: What people call it.
        vendor: `NVIDIA` or `AMD`.
        architecture: Compute capability such as `8.6`, or AMD's such as `gfx942`.
        multiprocessors: Its number of streaming multiprocessors or compute units.
        total_bytes: `torch.cuda.get_device_properties(...).total_memory`, newest seen on Linux.
        total_origin: `seen` where torch printed it, else `derived`, or `given` by the user.
        context_bytes: What a process holds beside the allocator when it runs out: context, lazily
            loaded kernels, library handles.
        context_origin: `measured: ...` with its source, or `band`: read off the cards of similar
            size that were measured (one to four samples each).
        source: Where `total_bytes` comes from.
    """

    name: str
    aliases: tuple[str, ...]
    vendor: str
    architecture: str
    multiprocessors: int
    total_bytes: int
    total_origin: str
    context_bytes: int
    context_origin: str
    source: str

    @property
    def context_range_bytes(self) -> tuple[int, int] | None:
        """The least and the most that processes on similar cards held, if `context_bytes` is such.

        `None` if the card itself was measured, and for AMD's cards, of which none was measured.
        """
        if self.context_origin != "band" or self.vendor != "NVIDIA":
            return None
        least, most = _CONTEXT_RANGES[self.context_bytes // MIB]
        return least * MIB, most * MIB

    @property
    def usable_bytes(self) -> int:
        """What the caching allocator can take."""
        return self.total_bytes - self.context_bytes

    @property
    def cautious_bytes(self) -> int | None:
        """What the allocator can take if the process holds the most that similar cards showed.

        `None` if the card itself was measured.
        """
        held = self.context_range_bytes
        return None if held is None else max(self.total_bytes - held[1], 0)

    @property
    def compute_capability(self) -> tuple[int, int]:
        """What decides which kernels are chosen.

        AMD's cards take flash and memory-efficient attention through AOTriton as compute
        capability 8.0 does.
        """
        major, dot, minor = self.architecture.partition(".")
        return (int(major), int(minor)) if dot else (8, 0)

    @property
    def has_bf16(self) -> bool:
        """Whether `auto` takes bf16: NVIDIA's from Ampere on, and AMD's."""
        return self.compute_capability >= (8, 0)

    @property
    def threads_per_multiprocessor(self) -> int:
        """How many threads a multiprocessor runs at once.

        Source: NVIDIA's CUDA C++ programming guide, technical specifications per compute
            capability. AMD's compute units run 2048.
        """
        capability = self.compute_capability
        if self.vendor == "AMD":
            return 2048
        if capability == _TURING:
            return 1024
        return 1536 if capability in _SMALL_AMPERE or capability[0] in _SMALL_BLACKWELL else 2048

    def blas_workspace_bytes(self, torch_release: tuple[int, int] = _NEWEST) -> int:
        """Return the bytes of a BLAS workspace.

        Args:
            torch_release: The major and minor version of torch.

        Source: `getChosenWorkspaceSize` in aten/src/ATen/cuda/CublasHandlePool.cpp; 32 MiB on
            Hopper, on Blackwell since torch 2.12 (pytorch/pytorch#175344), and on ROCm (128 MiB on
            gfx94x and gfx95x).
        """
        if self.vendor == "AMD":
            is_large = self.architecture.startswith(("gfx94", "gfx95"))
            return _WORKSPACE_GFX94_BYTES if is_large else _WORKSPACE_LARGE_BYTES
        large = (9, 10, 12) if torch_release >= _LARGE_ON_BLACKWELL else (9,)
        return _WORKSPACE_LARGE_BYTES if self.compute_capability[0] in large else _WORKSPACE_BYTES


def oldest_cudnn(compute_capability: tuple[int, int]) -> tuple[int, int]:
    """Return the oldest release of cuDNN that chooses kernels for a card that is not there.

    Before 9.13 it ends the process where it is asked for compute capability 10.0, as a B200 has.

    Source: cuDNN 9.10 and 9.19 were asked.
    """
    return (9, 13) if compute_capability == _LARGE_BLACKWELL else (9, 8)


@functools.cache
def catalogue() -> tuple[Gpu, ...]:
    """Return every card that is known, as listed."""
    text = resources.files(__package__).joinpath("cards.csv").read_text(encoding="utf-8")
    return tuple(
        Gpu(
            name=row["name"],
            aliases=tuple(row["aliases"].split(";")),
            vendor=row["vendor"],
            architecture=row["architecture"],
            multiprocessors=int(row["multiprocessors"]),
            total_bytes=int(row["total_bytes"]),
            total_origin=row["total_origin"],
            context_bytes=int(row["context_bytes"]),
            context_origin=row["context_origin"],
            source=row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    )


def is_rehearsed() -> bool:
    """Whether the CUDA devices of this process are rehearsed: torch's software, without a GPU."""
    return REHEARSED_CARD_VARIABLE in os.environ


def find_gpu(name: str, *, total_bytes: int | None = None) -> Gpu:
    """Return the card of a name, its memory overridden where a size is given.

    Args:
        name: As torch prints it, or an alias such as `rtx3090`, in any case and spacing; `any` is
            a card of which only `total_bytes` is known.
        total_bytes: What the card has, in place of the catalogue's figure.

    Raises:
        UsageError: No card has that name, or `any` was named without a size, or the size does not
            leave room for the process itself.
    """
    given: object = name
    if not isinstance(given, str):
        raise UsageError(
            f"A GPU is given by its name, such as 'rtx4090', not by {name!r}. memfit.survey and "
            "memfit.survey_plans take several, as gpus=[...]."
        )
    if _key(name) == ANY_GPU:
        if total_bytes is None:
            raise UsageError("The GPU 'any' has no memory size of its own. Give one, such as 6GiB.")
        gpu = _of_size(total_bytes)
    else:
        gpu = _named(name)
        if total_bytes is not None:
            gpu = dataclasses.replace(gpu, total_bytes=total_bytes, total_origin="given")
    if gpu.usable_bytes <= 0:
        raise UsageError(
            f"{format_bytes(gpu.total_bytes)} are less than a process without tensors takes on "
            f"{gpu.name} ({format_bytes(gpu.context_bytes)}). Give more."
        )
    return gpu


def each_once(names: Iterable[str], *, total_bytes: int | None = None) -> tuple[str, ...]:
    """Return the names of different cards, without a second name of the same card.

    Args:
        names: See `find_gpu`.
        total_bytes: See `find_gpu`.

    Raises:
        UsageError: See `find_gpu`.
    """
    named: dict[str, str] = {}
    for name in names:
        named.setdefault(find_gpu(name, total_bytes=total_bytes).name, name)
    return tuple(named.values())


def gpu_like(name: str, *, total_bytes: int) -> Gpu:
    """Return the catalogue's card of a name, or a card of which only the size is known.

    Args:
        name: As torch prints it, of a card that is there.
        total_bytes: What it has.
    """
    gpu = _by_key().get(_key(name))
    if gpu is None:
        return dataclasses.replace(_of_size(total_bytes), name=name)
    return dataclasses.replace(gpu, total_bytes=total_bytes, total_origin="given")


def gpu_with(compute_capability: tuple[int, int]) -> Gpu:
    """Return a card of which only the compute capability is known."""
    major, minor = compute_capability
    return dataclasses.replace(_of_size(1024 * GIB), architecture=f"{major}.{minor}")


def _named(name: str) -> Gpu:
    known = _by_key()
    gpu = known.get(_key(name))
    if gpu is None:
        near = difflib.get_close_matches(_key(name), known, n=3, cutoff=0.5)
        cards = dict.fromkeys(known[key] for key in near)
        names = [card.aliases[0] if card.aliases else card.name for card in cards]
        hint = f"; did you mean {' or '.join(names)}?" if names else "; see `memfit gpus`."
        raise UsageError(f"There is no GPU {name!r} in the catalogue{hint}")
    return gpu


def _of_size(total_bytes: int) -> Gpu:
    return Gpu(
        name="any GPU",
        aliases=(),
        vendor="NVIDIA",
        architecture="8.0",
        multiprocessors=108,
        total_bytes=total_bytes,
        total_origin="given",
        context_bytes=_CONTEXT_BANDS[-1][1] * MIB,
        context_origin="band",
        source="given",
    )


@functools.cache
def _by_key() -> dict[str, Gpu]:
    known: dict[str, Gpu] = {}
    for gpu in catalogue():
        for name in (gpu.name, *gpu.aliases):
            known.setdefault(_key(name), gpu)
            # "RTX 3090" for "NVIDIA GeForce RTX 3090".
            known.setdefault(re.sub(r"^(nvidia|amd)?(geforce|tesla)?", "", _key(name)), gpu)
    return known


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
