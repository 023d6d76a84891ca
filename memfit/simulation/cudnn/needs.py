"""The workspace of a convolution as a need: what cuDNN answers for a card and a batch size."""

from __future__ import annotations

import dataclasses
import math

from memfit.cards import Gpu
from memfit.simulation.cudnn.answers import Workspaces, workspaces_of
from memfit.simulation.cudnn.questions import Convolution
from memfit.simulation.needs import Need

__all__ = ["WorkspaceRule", "asks_cudnn", "workspace_need"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceRule:
    """Asks cuDNN for the workspace of a convolution of some size.

    Args:
        convolution: The convolution. Its shapes are empty, because they grow with the batch size.
        bound_bytes_per_element: The bytes for each element of the three tensors, used if cuDNN
            cannot be asked.
    """

    convolution: Convolution
    bound_bytes_per_element: int

    def __call__(self, gpu: Gpu, *sizes: int) -> int:
        """Return the bytes of the workspace.

        Args:
            gpu: The card.
            sizes: The shapes of the input, the weight and the output, one after another.
        """
        num_dims = len(sizes) // 3
        shapes = [sizes[at : at + num_dims] for at in range(0, len(sizes), num_dims)]
        workspaces = _answers(gpu)
        if workspaces is not None:
            found = workspaces.of(
                dataclasses.replace(
                    self.convolution,
                    input_shape=shapes[0],
                    weight_shape=shapes[1],
                    output_shape=shapes[2],
                )
            )
            if found is not None:
                return found
        return self.bound_bytes_per_element * sum(map(math.prod, shapes))


def asks_cudnn(gpu: Gpu) -> bool:
    """Whether the installed cuDNN says the workspaces of a card."""
    return _answers(gpu) is not None


def _answers(gpu: Gpu) -> Workspaces | None:
    return None if gpu.vendor == "AMD" else workspaces_of(gpu.compute_capability)


def workspace_need(convolution: Convolution, *, bound_bytes_per_element: int) -> Need:
    """Return the need of a convolution.

    Args:
        convolution: The convolution at the batch size of the recording.
        bound_bytes_per_element: See `WorkspaceRule`.
    """
    shapes = (convolution.input_shape, convolution.weight_shape, convolution.output_shape)
    unsized = dataclasses.replace(convolution, input_shape=(), weight_shape=(), output_shape=())
    return Need(
        rule=WorkspaceRule(convolution=unsized, bound_bytes_per_element=bound_bytes_per_element),
        numbers=sum(shapes, ()),
        is_slow=True,
    )
