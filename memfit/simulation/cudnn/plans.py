"""Asks cuDNN which plan it takes for a convolution, and what workspace the plan needs.

cuDNN 9.8 and later choose plans for a card that is described and not there. torch takes the first
plan of the heuristics that can be built. `cudnn.benchmark` tries several plans with a workspace
that is large enough for all of them.

Source: aten/src/ATen/native/cudnn/Conv_v8.cpp (which plans torch asks for, leaves out and tries);
"deviceless ahead-of-time compilation" in the documentation of cuDNN's frontend.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any, Final

import torch

from memfit.cards import oldest_cudnn
from memfit.simulation.cudnn.backend_api import (
    CudnnError,
    Descriptors,
    finds_driver,
    load_cudnn,
)
from memfit.simulation.cudnn.graphs import graph_of
from memfit.simulation.cudnn.questions import Convolution, ConvolutionKernel
from memfit.simulation.cudnn.splits import SPLITTING, PlanOfCard, whole_card_bytes

__all__ = ["ANY_QUESTION", "CudnnPlans", "PlanSettings", "cudnn_plans", "missing_cudnn"]

_FIRST_VERSION: Final = 90800
# What cuDNN wants to know about a card. Of 126 convolutions, only `deviceVer` (the compute
# capability) changed plans and workspaces, besides what is named below. So the other values are
# those of one card. cuDNN remembers a card by its name, so each card that differs has its own.
_SOME_CARD: Final[dict[str, Any]] = {
    "multiProcessorCount": 82,
    "warpSize": 32,
    "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 101376,
    "reservedSharedMemoryPerBlock": 1024,
    "maxRegistersPerSM": 65536,
    "maxCtasPerSM": 16,
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 1536,
    "regsPerBlock": 65536,
    "totalGlobalMem": 24 * 2**30,
    "smClockRateKHz": 1_695_000,
    "l2CacheSize": 6 * 2**20,
    "maxBlockSize": [1024, 1024, 64],
    "memClockRateKHz": 9_751_000,
    "maxGridSize": [2**31 - 1, 65535, 65535],
    "supportCoopLaunch": 1,
    "pciDeviceId": 0,
    "isTccDriver": 0,
    "cudaDeviceId": 0,
    "driverVer": 13020,
}
# On Turing, multiprocessors decide 24 of 126 workspaces (cuDNN 9.26). On Hopper, the clocks decide
# how far sums are split: those of an H100 (NVIDIA's data sheet). On Blackwell for data centers, the
# shared memory decides 57 of 126: CUDA's programming guide, table of compute capabilities.
_OF_ITS_OWN: Final[dict[tuple[int, int], dict[str, int]]] = {
    SPLITTING: {"smClockRateKHz": 1_980_000, "memClockRateKHz": 2_619_000},
    (10, 0): {"maxSharedMemoryPerBlockOptin": 232_448},
    (10, 3): {"maxSharedMemoryPerBlockOptin": 232_448},
}
# cudnnBackendHeurMode_t: torch takes the first plan of both lists.
_HEURISTICS: Final = 3
_FALLBACK: Final = 2
# cudnnBackendNumericalNote_t
_TENSOR_CORE: Final = 0
_DOWN_CONVERT_INPUTS: Final = 1
_NONDETERMINISTIC: Final = 4
# Each plan of a list takes a sixth of a millisecond, and the first one is mostly taken.
_PLANS_AT_ONCE: Final = (1, 8, 256)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """The settings of torch that leave plans out.

    Args:
        allows_tf32: `torch.backends.cudnn.allow_tf32`.
        is_deterministic: `torch.backends.cudnn.deterministic`.
    """

    allows_tf32: bool = True
    is_deterministic: bool = False

    @classmethod
    def current(cls) -> PlanSettings:
        """Return those of this process."""
        cudnn = torch.backends.cudnn
        return cls(
            allows_tf32=cudnn.allow_tf32,
            is_deterministic=cudnn.deterministic,
        )

    @property
    def text(self) -> str:
        """All fields, as part of a file's name."""
        return f"tf32-{self.allows_tf32:d}-det-{self.is_deterministic:d}"


@functools.cache
def missing_cudnn() -> str | None:
    """Say why cuDNN cannot be asked.

    Returns:
        The reason, as the end of a sentence; `None` if it can be asked.
    """
    if torch.version.cuda is None:
        return "this torch was not built for CUDA"
    try:
        version = load_cudnn().cudnnGetVersion()
    except (OSError, AttributeError) as error:
        return f"the cuDNN of this torch does not load ({error})".splitlines()[0]
    if version < _FIRST_VERSION:
        return f"cuDNN is older than 9.8 ({version})"
    return None


def cudnn_plans(
    compute_capability: tuple[int, int],
    settings: PlanSettings | None = None,
    *,
    multiprocessors: int | None = None,
) -> CudnnPlans | None:
    """Return what answers for a card.

    Args:
        compute_capability: The compute capability of the card, such as (8, 6).
        settings: What leaves plans out; `None` for the settings of this process.
        multiprocessors: How many the card has; `None` where plans do not depend on it.

    Returns:
        What answers; `None` if cuDNN cannot be asked.
    """
    if missing_cudnn() is not None:
        return None
    plans = CudnnPlans(compute_capability, settings or PlanSettings.current(), multiprocessors)
    major, minor = oldest_cudnn(compute_capability)
    return plans if plans.version >= 10_000 * major + 100 * minor else None


class CudnnPlans:
    """The plans of the installed cuDNN for one compute capability.

    Args:
        compute_capability: Such as (8, 6).
        settings: What leaves plans out.
        multiprocessors: See `cudnn_plans`.

    Attributes:
        properties: The card as cuDNN is told of it, as JSON.
    """

    def __init__(
        self,
        compute_capability: tuple[int, int],
        settings: PlanSettings,
        multiprocessors: int | None = None,
    ) -> None:
        self.settings = settings
        self._library = load_cudnn()
        major, minor = compute_capability
        own = _OF_ITS_OWN.get(compute_capability, {})
        card = {**_SOME_CARD, **own, "deviceVer": 100 * major + 10 * minor}
        if multiprocessors is not None:
            card["multiProcessorCount"] = multiprocessors
        card["deviceName"] = f"GPU {major}.{minor} of {card['multiProcessorCount']}"
        self._splits_on = multiprocessors if compute_capability == SPLITTING else None
        self.properties = json.dumps(card)
        # The question whose plans were last asked for by rank, the rest of them, and their answers.
        self._ranked: tuple[Convolution, Iterator[int], list[int]] | None = None

    @property
    def version(self) -> int:
        """The version of cuDNN, such as 92600."""
        return int(self._library.cudnnGetVersion())

    @property
    def has_driver(self) -> bool:
        """Whether cuDNN finds a driver; else it names fewer plans."""
        return finds_driver()

    def workspace_bytes(self, convolution: Convolution) -> int | None:
        """Return the workspace of the plan that is taken, or of the largest plan that is tried.

        Args:
            convolution: The question.

        Returns:
            Bytes; `None` if cuDNN has no plan.
        """
        if convolution.tries_plans:
            # `benchmark_limit` is how many are timed. The room is made for the largest of all.
            return max(self._workspaces(convolution), default=None)
        if not convolution.rank:
            return next(self._workspaces(convolution), None)
        # Where a workspace finds no room, the next ranks are asked for one after another.
        asked = dataclasses.replace(convolution, rank=0)
        if self._ranked is None or self._ranked[0] != asked:
            self._ranked = (asked, self._workspaces(asked), [])
        _, plans, found = self._ranked
        found += itertools.islice(plans, max(0, convolution.rank + 1 - len(found)))
        return found[convolution.rank] if convolution.rank < len(found) else None

    @functools.cached_property
    def _card(self) -> ctypes.c_void_p:
        """The card's descriptor, kept for all questions."""
        return Descriptors(self._library).card(self.properties)

    def _workspaces(self, convolution: Convolution) -> Iterator[int]:
        """Yield the workspace of each plan that can be built, in the order of both lists."""
        left_out = self._left_out(convolution)
        with Descriptors(self._library) as cudnn, contextlib.suppress(CudnnError):
            graph = graph_of(cudnn, convolution)
            for mode in (_HEURISTICS, _FALLBACK):
                for config in _configs(cudnn, graph, self._card, mode):
                    if left_out and left_out & cudnn.notes(config):
                        continue
                    stated = cudnn.workspace_bytes(config, self._card)
                    if stated is not None:
                        yield self._on_whole_card(cudnn, graph, config, convolution, stated)

    def _on_whole_card(
        self,
        cudnn: Descriptors,
        graph: ctypes.c_void_p,
        config: ctypes.c_void_p,
        convolution: Convolution,
        stated: int,
    ) -> int:
        """Return a plan's workspace on all multiprocessors, where cuDNN counts some of them."""
        if self._splits_on is None:
            return stated
        asked = PlanOfCard(cudnn=cudnn, graph=graph, config=config, card=self._card)
        return whole_card_bytes(asked, convolution, stated, self._splits_on)

    def _left_out(self, convolution: Convolution) -> frozenset[int]:
        """Return the numerical notes of the engines that torch leaves out."""
        left_out = set()
        if convolution.dtype == "float32":
            left_out.add(_DOWN_CONVERT_INPUTS)
            if not self.settings.allows_tf32:
                left_out.add(_TENSOR_CORE)
        if self.settings.is_deterministic:
            left_out.add(_NONDETERMINISTIC)
        return frozenset(left_out)


def _configs(
    cudnn: Descriptors, graph: ctypes.c_void_p, card: ctypes.c_void_p, mode: int
) -> Iterator[ctypes.c_void_p]:
    """Yield the plans of a list; none if cuDNN has no such list for the graph."""
    with contextlib.suppress(CudnnError):
        heuristics = cudnn.heuristics(graph, card, mode)
        num_seen = 0
        for num_most in _PLANS_AT_ONCE:
            found = cudnn.configs(heuristics, num_most)
            yield from found[num_seen:]
            num_seen = len(found)
            if num_seen < num_most:
                return


# A convolution for which cuDNN has a plan on every card that it knows.
ANY_QUESTION: Final = Convolution(
    kernel=ConvolutionKernel.FORWARD,
    dtype="float32",
    is_channels_last=False,
    input_shape=(1, 8, 8, 8),
    weight_shape=(8, 8, 1, 1),
    output_shape=(1, 8, 8, 8),
    padding=(0, 0),
    stride=(1, 1),
    dilation=(1, 1),
)
