"""The workspace of a convolution as a need: what cuDNN answers for a card and a batch size."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import torch

from memfit.cards import Gpu
from memfit.simulation.cudnn.answers import Workspaces, workspaces_of
from memfit.simulation.cudnn.questions import Convolution
from memfit.simulation.needs import Need

__all__ = ["WorkspaceRule", "asks_cudnn", "bound_need", "workspace_need"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BoundRule:
    """A multiple of a convolution's tensors, whatever cuDNN is installed.

    Args:
        convolution: The convolution, for which torch keeps a plan. Its shapes are empty, because
            they grow with the batch size.
        bytes_per_element: The bytes for each element of the three tensors.
    """

    convolution: Convolution
    bytes_per_element: int

    def __call__(self, _gpu: Gpu, *sizes: int) -> int:
        """Return the bytes; `sizes` as for `WorkspaceRule`."""
        return self.bytes_per_element * sum(map(math.prod, _shapes(sizes)))

    @staticmethod
    def others(_gpu: Gpu, *_sizes: int) -> Iterator[int]:
        """Yield what is asked for if that finds no room: there is a plan without a workspace."""
        yield 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceRule:
    """Asks cuDNN for the workspace of a convolution of some size.

    Args:
        convolution: The convolution. Its shapes are empty, because they grow with the batch size.
        bound_bytes_per_element: The bytes for each element of the three tensors, used if cuDNN
            cannot be asked.
        is_quick: cuDNN is not asked.
    """

    convolution: Convolution
    bound_bytes_per_element: int
    is_quick: bool = False

    def __call__(self, gpu: Gpu, *sizes: int) -> int:
        """Return the bytes of the workspace.

        Args:
            gpu: The card.
            sizes: The shapes of the input, the weight and the output, one after another.
        """
        shapes = _shapes(sizes)
        product_bytes = self._product_bytes(gpu, shapes)
        if product_bytes is not None:
            return product_bytes
        workspaces = None if self.is_quick else _answers(gpu)
        found = None if workspaces is None else workspaces.of(self._sized(shapes))
        if found is not None:
            return found
        return self.bound_bytes_per_element * sum(map(math.prod, shapes))

    def others(self, gpu: Gpu, *sizes: int) -> Iterator[int]:
        """Yield the workspaces of the plans that torch tries if the first one finds no room.

        Where cuDNN cannot be asked, there is a plan without a workspace.

        Source: `try_configs` in aten/src/ATen/native/cudnn/Conv_v8.cpp.
        """
        workspaces = None if self.is_quick else _answers(gpu)
        if workspaces is None:
            yield 0
            return
        shapes = _shapes(sizes)
        sized = self._sized(shapes)
        for rank in itertools.count(1 if self._product_bytes(gpu, shapes) is None else 0):
            found = workspaces.of(dataclasses.replace(sized, rank=rank))
            if found is None:
                return
            yield found

    def _product_bytes(self, gpu: Gpu, shapes: tuple[tuple[int, ...], ...]) -> int | None:
        """Return the workspace of cuBLASLt's plan, if it comes before those that cuDNN names."""
        asked = self.convolution
        if gpu.vendor == "AMD" or asked.tries_plans:
            return None
        if asked.dtype == "float32" and not torch.backends.cudnn.allow_tf32:
            return None
        return asked.product_bytes(*shapes[:2])

    def _sized(self, shapes: tuple[tuple[int, ...], ...]) -> Convolution:
        inputs, weight, output = shapes
        return dataclasses.replace(
            self.convolution, input_shape=inputs, weight_shape=weight, output_shape=output
        )


def _shapes(sizes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    num_dims = len(sizes) // 3
    return tuple(sizes[at : at + num_dims] for at in range(0, len(sizes), num_dims))


def asks_cudnn(gpu: Gpu) -> bool:
    """Whether the installed cuDNN says the workspaces of a card."""
    return _answers(gpu) is not None


def _answers(gpu: Gpu) -> Workspaces | None:
    return None if gpu.vendor == "AMD" else workspaces_of(gpu)


def workspace_need(
    convolution: Convolution, *, bound_bytes_per_element: int, is_quick: bool = False
) -> Need:
    """Return the need of a convolution.

    Args:
        convolution: The convolution at the batch size of the recording.
        bound_bytes_per_element: See `WorkspaceRule`.
        is_quick: See `WorkspaceRule`.
    """
    rule = WorkspaceRule(
        convolution=_unsized(convolution),
        bound_bytes_per_element=bound_bytes_per_element,
        is_quick=is_quick,
    )
    # Without cuDNN's answers, a workspace is a multiple of tensors.
    return Need(
        rule=rule,
        numbers=_sizes_of(convolution),
        is_slow=not is_quick,
        is_even=is_quick,
        others=rule.others,
    )


def bound_need(convolution: Convolution, *, bytes_per_element: int) -> Need:
    """Return the need of a convolution of another cuDNN than the installed one: the bound.

    Args:
        convolution: The convolution at the batch size of the recording.
        bytes_per_element: See `BoundRule`.
    """
    rule = BoundRule(convolution=_unsized(convolution), bytes_per_element=bytes_per_element)
    return Need(rule=rule, numbers=_sizes_of(convolution), is_even=True, others=rule.others)


def _unsized(convolution: Convolution) -> Convolution:
    return dataclasses.replace(convolution, input_shape=(), weight_shape=(), output_shape=())


def _sizes_of(convolution: Convolution) -> tuple[int, ...]:
    return (*convolution.input_shape, *convolution.weight_shape, *convolution.output_shape)
