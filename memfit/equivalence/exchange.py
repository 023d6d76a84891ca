"""Samples of which one is replaced by another, and which parts of outputs are whose."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import nn

from memfit.equivalence.samples import Samples

__all__ = ["Exchange"]


@dataclasses.dataclass(frozen=True, slots=True)
class Exchange:
    """The samples of one experiment: some that run, and one that replaces one of them.

    Args:
        model: The model.
        samples: All samples.
        num: How many of them run.
    """

    model: nn.Module
    samples: Samples
    num: int

    def inputs(self, changed: int | None = None) -> Any:
        """Return the inputs of the samples that run, with one of them replaced."""
        rows = [self.num if row == changed else row for row in range(self.num)]
        return self.samples.picked(rows).of(0, self.num)[0]

    @property
    def all_inputs(self) -> Any:
        """The inputs of all samples."""
        return self.samples.of(0, self.samples.num_samples)[0]

    def own_rows(
        self, tensor: torch.Tensor, longer: torch.Size | None, sample: int
    ) -> torch.Tensor | None:
        """Return one sample's part of a layer's output; `None` if the output has no samples."""
        dim = self._dim(tensor, longer)
        if dim is None:
            return None
        per_sample = tensor.shape[dim] // self.num
        return tensor.narrow(dim, sample * per_sample, per_sample)

    def apart_in_others(
        self, old: torch.Tensor, new: torch.Tensor, longer: torch.Size | None, sample: int
    ) -> float:
        """Return the distance of two outputs in all samples but one."""
        dim = self._dim(old, longer)
        if dim is None:
            return float(torch.linalg.vector_norm(new - old))
        size = old.shape[dim]
        start, stop = (size // self.num * place for place in (sample, sample + 1))
        others = [(at, end - at) for at, end in ((0, start), (stop, size)) if at < end]
        return math.hypot(
            *(
                float(torch.linalg.vector_norm(new.narrow(dim, *span) - old.narrow(dim, *span)))
                for span in others
            )
        )

    def by_row(self, difference: torch.Tensor, longer: torch.Size | None) -> torch.Tensor:
        """Return the largest change of each row; of each element, if there are no samples."""
        dim = self._dim(difference, longer)
        if dim is None or difference.ndim == 1:
            return difference.abs()
        return difference.abs().movedim(dim, 0).flatten(1).amax(1)

    def _dim(self, tensor: torch.Tensor, longer: torch.Size | None) -> int | None:
        """Return the dimension of a layer's output that has the samples."""
        if longer is None or len(longer) != tensor.ndim:
            return None
        sizes = enumerate(zip(tensor.shape, longer, strict=True))
        num, more = self.num, self.samples.num_samples
        return next((dim for dim, (a, b) in sizes if a != b and a * more == b * num), None)
