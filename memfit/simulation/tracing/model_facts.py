"""What is known of a model without a card."""

from __future__ import annotations

import dataclasses

from torch import nn

__all__ = ["ModelFacts"]

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What is known of a model without a card.

    Args:
        num_parameters: Its parameters.
        forward_flops: Operations of one sample's forward pass; `None` if they cannot be counted.
        has_batch_norm: Whether a layer normalises over the samples of a micro-batch.
    """

    num_parameters: int
    forward_flops: int | None
    has_batch_norm: bool

    @classmethod
    def of(cls, model: nn.Module, *, forward_flops: int | None) -> ModelFacts:
        """Count what a model has.

        Args:
            model: The model.
            forward_flops: What a forward pass of it has shown; see the class.
        """
        return cls(
            num_parameters=sum(weight.numel() for weight in model.parameters()),
            forward_flops=forward_flops,
            has_batch_norm=any(isinstance(module, _BATCH_NORMS) for module in model.modules()),
        )
