"""Workspaces of cuDNN's kernels for Hopper, which share a sum between all multiprocessors.

These kernels compute one tile of the result for each cluster of blocks, wave after wave. The tiles
of the last wave do not fill the card. So each of them is split: several clusters sum a part of it
each, and the parts are in the workspace. How many parts there are depends on the number of
multiprocessors. For a card that is only described, cuDNN counts 18 of them, whatever its
description says. The workspace for the whole card is worked out here from three others that cuDNN
states: that of one cluster, in which nothing is split, and two of a problem of the same depth with
few tiles, which tell how far cuDNN splits one.

Source: workspaces that cuDNN 9.10, 9.19 and 9.26 state for 1 to 18 multiprocessors
    (CUDNN_ATTR_ENGINE_SM_COUNT_TARGET); the rule reproduces them to the byte. Of the workspaces of
    a real H100 (benchmarks/data/h100-convolutions.csv, cuDNN 9.19), all but those of 1x1
    convolutions, 1,655 of 1,674 are right up to 400 bytes with it, and 1,487 without it.
    Sums that are split over a last wave: Osama et al., "Stream-K", PPoPP 2023.
"""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Final

from memfit.simulation.cudnn.backend_api import CudnnError, Descriptors
from memfit.simulation.cudnn.graphs import graph_of
from memfit.simulation.cudnn.questions import Convolution, ConvolutionKernel

__all__ = ["SPLITTING", "PlanOfCard", "most_clusters", "whole_card_bytes"]

SPLITTING: Final = (9, 0)  # the compute capability of cards whose kernels do this
# cudnnBackendKnobType_t
_TILE: Final = 2
_WORKSPACE: Final = 25
_CLUSTER_M: Final = 27
_CLUSTER_N: Final = 28
# Rows and columns of a tile, by the value of its knob. Others were not seen to be split.
_TILES: Final = {
    0: (128, 128),
    1: (128, 64),
    3: (256, 128),
    4: (256, 64),
    5: (64, 64),
    7: (64, 128),
    9: (64, 256),
}
_DESCRIBED: Final = 18  # the multiprocessors of a card that is only described
# Groups of multiprocessors that explain what an H100 with 132 of them ran at once.
_GROUPS: Final = (18, 18, 16, 16, 16, 16, 16, 8)
_GROUPED: Final = 132
_NUM_DIMS: Final = 4
_FLOAT_BYTES: Final = 4
_MANY_WAVES: Final = 3
_ALIGNED_BYTES: Final = 128


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanOfCard:
    """A plan for a card that is described.

    Args:
        cudnn: The descriptors of the question.
        graph: The convolution's graph.
        config: The plan's configuration.
        card: The card's description.
    """

    cudnn: Descriptors
    graph: ctypes.c_void_p
    config: ctypes.c_void_p
    card: ctypes.c_void_p


def whole_card_bytes(
    plan: PlanOfCard, convolution: Convolution, stated: int, multiprocessors: int
) -> int:
    """Return the workspace of a plan on the whole card.

    Args:
        plan: The plan.
        convolution: The question.
        stated: The workspace that cuDNN states, in bytes.
        multiprocessors: How many the card has.

    Returns:
        Bytes; those that cuDNN states if the plan is not of this kind.
    """
    kernel = _Kernel.of(plan) if len(convolution.input_shape) == _NUM_DIMS else None
    if kernel is None or kernel.size > _DESCRIBED:
        return stated
    try:
        return _whole_card_bytes(plan, kernel, convolution, stated, multiprocessors)
    except CudnnError:
        return stated


def most_clusters(size: int, multiprocessors: int) -> int:
    """Return how many clusters of blocks run at once on a card of compute capability 9.0.

    The blocks of a cluster share a group of multiprocessors, so some of these stay idle. One H100
    ran 30 clusters of four blocks, 22 of five, 15 of eight and seven of 16. Which multiprocessors a
    chip has is chance, so another H100 may run others.

    Args:
        size: Blocks in a cluster.
        multiprocessors: How many the card has.
    """
    if size <= 2:  # noqa: PLR2004 - two multiprocessors are always together
        return multiprocessors // size
    clusters = sum(group // size for group in _GROUPS)
    return max(1, clusters * multiprocessors // _GROUPED)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Kernel:
    """A kernel of this kind.

    Args:
        engine: Its number.
        knobs: Its settings, by cuDNN's numbers.
    """

    engine: int
    knobs: dict[int, int]

    @classmethod
    def of(cls, plan: PlanOfCard) -> _Kernel | None:
        knobs = plan.cudnn.knobs(plan.config)
        if knobs.get(_TILE) not in _TILES or not {_WORKSPACE, _CLUSTER_M, _CLUSTER_N} <= set(knobs):
            return None
        return cls(engine=plan.cudnn.engine_number(plan.config), knobs=knobs)

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns."""
        return _TILES[self.knobs[_TILE]]

    @property
    def cluster(self) -> tuple[int, int]:
        """Blocks along the rows and the columns of the result."""
        return self.knobs[_CLUSTER_M], self.knobs[_CLUSTER_N]

    @property
    def size(self) -> int:
        """Blocks in a cluster."""
        rows, columns = self.cluster
        return rows * columns

    @property
    def alone(self) -> _Kernel:
        """The same kernel with clusters of one block. It splits as far."""
        return dataclasses.replace(self, knobs={**self.knobs, _CLUSTER_M: 1, _CLUSTER_N: 1})

    def bytes_on(self, plan: PlanOfCard, graph: ctypes.c_void_p, multiprocessors: int) -> int:
        """Return the workspace on some multiprocessors of the plan's card.

        Raises:
            CudnnError: There is no such plan.
        """
        config = plan.cudnn.retargeted(graph, plan.card, self.engine, self.knobs, multiprocessors)
        num_bytes = plan.cudnn.workspace_bytes(config, plan.card)
        if num_bytes is None:
            raise CudnnError("The plan cannot be built.")
        return num_bytes


def _whole_card_bytes(
    plan: PlanOfCard,
    kernel: _Kernel,
    convolution: Convolution,
    stated: int,
    multiprocessors: int,
) -> int:
    num_tiles = _cluster_tiles(kernel, convolution)
    # On one cluster the tiles follow one another, and none is split.
    in_turn = _added_bytes(kernel, num_tiles, clusters=1, parts=1)
    unsplit = kernel.bytes_on(plan, plan.graph, kernel.size) - in_turn
    described = _DESCRIBED // kernel.size
    if stated - unsplit not in {
        _added_bytes(kernel, num_tiles, described, parts)
        for parts in range(1, _most_parts(num_tiles, described) + 1)
    }:
        return stated  # another rule, that is not known
    clusters = most_clusters(kernel.size, multiprocessors)
    most = _most_parts(num_tiles, clusters)
    parts = 1
    if most > 1:
        asked = min(most, _DESCRIBED)
        parts = _parts(plan, kernel, convolution, asked, is_first=num_tiles < clusters)
        if parts == asked:  # as many as can be asked for
            parts = most
    return unsplit + _added_bytes(kernel, num_tiles, clusters, parts)


def _cluster_tiles(kernel: _Kernel, convolution: Convolution) -> int:
    """Return how many tiles of a whole cluster the result has."""
    samples, _, *size = convolution.input_shape
    _, channels, *window = convolution.weight_shape
    pixels = convolution.output_shape[2] * convolution.output_shape[3]
    rows, columns = kernel.tile
    groups, filters = _groups(convolution)
    if convolution.kernel is ConvolutionKernel.FILTER:
        down, across = _ceil(filters, rows), _ceil(channels, columns) * window[0] * window[1]
        # Several small groups share a tile.
        groups = _ceil(groups, max(1, min(rows // filters, columns // channels)))
    elif convolution.kernel is ConvolutionKernel.FORWARD:
        down, across = _ceil(samples * pixels, rows), _ceil(filters, columns)
    else:
        down, across = _ceil(samples * size[0] * size[1], rows), _ceil(channels, columns)
    of_group = _ceil(down, kernel.cluster[0]) * _ceil(across, kernel.cluster[1])
    return of_group * groups


def _groups(convolution: Convolution) -> tuple[int, int]:
    """Return how many groups there are, and the filters of each."""
    groups = convolution.input_shape[1] // convolution.weight_shape[1]
    return groups, convolution.weight_shape[0] // groups


def _most_parts(num_tiles: int, clusters: int) -> int:
    """Return into how many parts each tile of the last wave can be split."""
    last = num_tiles % clusters
    return clusters // last if last else 1


def _added_bytes(kernel: _Kernel, num_tiles: int, clusters: int, parts: int) -> int:
    """Return what parts and their counters take of a workspace, in bytes.

    Pairs of parts are added up, then pairs of these sums: a counter for each sum of a tile.
    """
    blocks = num_tiles % clusters * kernel.size
    counters = 1 if _ceil(num_tiles, clusters) >= _MANY_WAVES else 0
    if parts > 1:
        sums, left = 1, _ceil(parts, 2)
        while left > 1:
            sums, left = sums + left, _ceil(left, 2)
        counters += 8 + blocks * sums
    if not counters:
        return 0
    rows, columns = kernel.tile
    held = blocks * parts * rows * columns * _FLOAT_BYTES if parts > 1 else 0
    return held + counters * _FLOAT_BYTES + _ALIGNED_BYTES - 1


def _parts(
    plan: PlanOfCard,
    kernel: _Kernel,
    convolution: Convolution,
    most: int,
    *,
    is_first: bool,
) -> int:
    """Ask into how many parts cuDNN splits a tile, of those that are possible.

    It weighs the shorter sums against adding up the parts. That does not depend on the number of
    tiles, but on whether there was a wave before. So a problem of as long sums with one tile, or
    one more than the multiprocessors that are asked for, gives the same answer.
    """
    small = _same_depth(kernel, convolution, 1 if is_first else most + 1)
    graph = graph_of(plan.cudnn, small)
    alone = kernel.alone
    held = alone.bytes_on(plan, graph, most) - alone.bytes_on(plan, graph, 1)
    rows, columns = kernel.tile
    return max(1, held // (rows * columns * _FLOAT_BYTES))


def _same_depth(kernel: _Kernel, convolution: Convolution, num_tiles: int) -> Convolution:
    """Return a problem with as long sums and so many tiles."""
    samples = convolution.input_shape[0]
    _, channels, *window = convolution.weight_shape
    _, filters = _groups(convolution)
    rows, columns = kernel.tile
    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    if convolution.kernel is ConvolutionKernel.FILTER:
        size = convolution.output_shape[2:]
        shapes = (
            (samples, columns * num_tiles, *size),
            (rows, columns * num_tiles, 1, 1),
            (samples, rows, *size),
        )
    elif convolution.kernel is ConvolutionKernel.FORWARD:
        samples = rows * num_tiles
        shapes = (
            (samples, channels, *window),
            (columns, channels, *window),
            (samples, columns, 1, 1),
        )
    else:
        samples = rows * num_tiles // (window[0] * window[1])
        shapes = (
            (samples, columns, *window),
            (filters, columns, *window),
            (samples, filters, 1, 1),
        )
    inputs, weights, outputs = shapes
    return dataclasses.replace(
        convolution,
        input_shape=inputs,
        weight_shape=weights,
        output_shape=outputs,
        padding=(0, 0),
        stride=(1, 1),
        dilation=(1, 1),
    )


def _ceil(amount: int, unit: int) -> int:
    return -(-amount // unit)
