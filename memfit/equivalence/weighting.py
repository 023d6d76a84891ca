"""Finds out what a loss averages over, by cutting its batch.

If the loss does not mix samples, the gradient of the whole batch's loss is a weighted sum of the
gradients of the losses of its parts. The weights are measured. If the loss is computed outside the
model, they are measured in the rows of the model's outputs; otherwise, in the parameters. Then
`memfit.equivalence.counting` looks for a count that gives these weights. If no weights fit, the
loss may be one number that adds means over different things. So its summands
(`memfit.equivalence.terms`) are measured one by one. If they do not fit either, the loss mixes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from memfit.equivalence.counting import SAMPLES, SUM, Count, candidates, of_classes
from memfit.equivalence.gradients import CheckSetup
from memfit.equivalence.measuring import Measured, Measures, outputs_of
from memfit.equivalence.samples import Samples
from memfit.equivalence.state import held_by
from memfit.equivalence.terms import Parts
from memfit.errors import MemfitError, WorkloadError
from memfit.memory import oom
from memfit.records import LossTerm, LossWeighting, MixesIn, MixingLayer

__all__ = ["Weights", "in_parameters", "of_step"]

_MOST_MOVES = 8
_MOST_CLASSES = 4096
_MOST_HELD = 16
_ONE_SAMPLE = re.compile(r"\]\[\d+\]\[")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What the losses of a step average over.

    Args:
        terms: Each loss, and the rule that its measured weights follow. For one number that adds
            different means: each of its summands.
        counts: For each returned loss, what it counts.
        mixer: The loss, if it mixes samples.
        adds_different_means: The loss is one number, and its summands need different weights.
        planned: Weights that were computed before, by cut.
    """

    terms: tuple[LossTerm, ...]
    counts: tuple[Count, ...]
    mixer: MixingLayer | None = None
    adds_different_means: bool = False
    planned: Mapping[tuple[int, ...], tuple[tuple[float, ...], ...]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def rules(self) -> frozenset[LossWeighting]:
        """The rules of the losses, each once."""
        return frozenset(term.weighting for term in self.terms)

    @property
    def weighting(self) -> LossWeighting:
        """The rule of all losses, if it is the same for all."""
        return next(iter(self.rules)) if len(self.rules) == 1 else LossWeighting.SEVERAL

    def of(self, cut: Sequence[int], samples: Samples) -> tuple[tuple[float, ...], ...]:
        """Return for each micro-batch the factors of its losses.

        Args:
            cut: Samples in each micro-batch.
            samples: The whole batch.
        """
        if len(cut) == 1:
            return ((1.0,) * len(self.counts),)
        if tuple(cut) in self.planned:
            return self.planned[tuple(cut)]
        by_loss = [count.shares(cut, samples) or (0.0,) * len(cut) for count in self.counts]
        return tuple(zip(*by_loss, strict=True))

    def plan(self, cuts: Iterable[tuple[int, ...]], samples: Samples) -> Weights:
        """Compute the weights of some cuts now, from the batch before anything changes it."""
        return dataclasses.replace(self, planned={cut: self.of(cut, samples) for cut in cuts})


def of_step(setup: CheckSetup, cut: Sequence[int], *, is_mixing: bool = False) -> Weights:
    """Find out what the losses of a step average over, and whether they mix samples.

    Args:
        setup: A step and its batch, on the CPU.
        cut: Samples in each micro-batch, not all the same.
        is_mixing: Layers of the model mix samples, so the parameters' gradients say nothing about
            the loss.

    Returns:
        The rules, and the loss if it mixes.
    """
    outputs = outputs_of(setup)
    if outputs is not None:
        try:
            return _Finder(setup, tuple(cut), outputs).found(is_mixing=False)
        except Exception as error:
            # The loss may need more than the values of some samples' outputs, and fail: outputs
            # may be scores for all pairs, or name other samples by their places.
            if isinstance(error, MemfitError) or oom.classify(error) is not oom.Likelihood.NO:
                raise
    return _Finder(setup, tuple(cut), None).found(is_mixing=is_mixing)


def in_parameters(setup: CheckSetup, cut: Sequence[int]) -> Weights:
    """Do the same as `of_step`, but always from the gradients of the parameters."""
    return _Finder(setup, tuple(cut), None).found(is_mixing=False)


class _Finder:
    """Measures the weights of one step's losses, and finds the counts that give them."""

    def __init__(self, setup: CheckSetup, cut: tuple[int, ...], outputs: Any | None) -> None:
        self._setup = setup
        self._cut = cut
        self._measures = Measures(setup, outputs)
        self._close = 1e-7 if setup.precision is None else 1e-4

    def found(self, *, is_mixing: bool) -> Weights:
        """Return the rule of each loss, and the loss if no weights fit."""
        measured = self._measures.of(self._cut, self._setup.samples, Parts.WHOLE)
        counts = [self._count_of(index, one, Parts.WHOLE) for index, one in enumerate(measured)]
        if None not in counts:
            return _weights(measured, counts)
        for split in (Parts.SUMMANDS, Parts.KINDS) if len(measured) == 1 else ():
            parts = self._measures.of(self._cut, self._setup.samples, split)
            of_parts = [self._count_of(index, one, split) for index, one in enumerate(parts)]
            if len(parts) > 1 and None not in of_parts:
                apart = _weights(parts, of_parts, inside=True)
                return dataclasses.replace(apart, counts=(SAMPLES,), adds_different_means=True)
        if is_mixing:
            return _weights(measured, [self._nearest(one) for one in measured])
        missing = [one for one, count in zip(measured, counts, strict=True) if count is None]
        worst = max(missing, key=lambda one: one.unexplained)
        loss = self._setup.loss
        mixer = MixingLayer(
            name="loss" if len(measured) == 1 else f"loss {worst.name!r}",
            type_name=getattr(loss, "__name__", type(loss).__name__),
            mixes_in=MixesIn.LOSS,
            moved=worst.unexplained,
        )
        return dataclasses.replace(
            _weights(measured, [count or SAMPLES for count in counts]), mixer=mixer
        )

    def _count_of(self, index: int, measured: Measured, split: Parts) -> Count | None:
        """Return what one loss averages over; `None` if no weights fit, or samples mix."""
        samples = self._setup.samples
        if not measured.unexplained <= self._close:
            return None
        if measured.unexplained == 0 and not any(measured.weights):
            return SAMPLES  # a loss without a gradient
        for count in (SAMPLES, SUM):
            if self._fits(count, self._cut, measured):
                return count if self._holds(count, index, split) else None
        singles = self._singles(index, split)
        named = list(candidates(samples, self._weights_of_classes()))
        if singles is not None and singles.unexplained <= self._close:
            named += of_classes(samples, (1,) * samples.num_samples, singles.fit)
        targets = [one for one in named if one.weighting is LossWeighting.TARGETS]
        for count in (*named, *(one.clamped() for one in targets)):
            if self._fits(count, self._cut, measured) and (
                singles is None or self._fits(count, (1,) * samples.num_samples, singles)
            ):
                return count if self._holds(count, index, split) else None
        return self._unnamed(index, measured, split)

    def _fits(self, count: Count, cut: Sequence[int], measured: Measured) -> bool:
        shares = count.shares(cut, self._setup.samples)
        return shares is not None and measured.off(shares) <= self._close

    def _holds(self, count: Count, index: int, split: Parts) -> bool:
        """Whether a count gives the weights for other outputs of the same batch as well.

        A loss over the hardest samples, or over the largest one, may happen to have such weights.
        """
        if self._measures.outputs is None:
            return True
        samples = self._setup.samples
        for moved in self._moves:
            again = self._measures.of(self._cut, samples, split, moved=moved)
            is_known = bool(again) and math.isfinite(again[index].unexplained)
            if is_known and not self._fits(count, self._cut, again[index]):
                return False
        return True

    @property
    def _moves(self) -> Iterable[int]:
        """By how many places outputs go on; few, if the model has to run again."""
        most = 2 if self._measures.outputs is None else _MOST_MOVES
        return range(1, max(2, min(most + 1, self._setup.num_samples)))

    def _singles(self, index: int, split: Parts) -> Measured | None:
        """Measure each sample as a separate part, if the step takes single samples."""
        ones = (1,) * self._setup.num_samples
        try:
            return self._measures.of(ones, self._setup.samples, split)[index]
        except (RuntimeError, ValueError, TypeError, IndexError, WorkloadError):
            return None

    def _unnamed(self, index: int, measured: Measured, split: Parts) -> Count | None:
        """Return measured weights as a rule, if they do not depend on the outputs or parameters.

        For a gradient of one element a single factor always fits, whatever the loss does. A count
        of the batch is the same for other outputs. A factor that changes with them is not a count.
        """
        samples = self._setup.samples
        for moved in self._moves:
            again = self._measures.of(self._cut, samples, split, moved=moved)[index]
            same = all(
                math.isclose(one, other, rel_tol=10 * self._close, abs_tol=self._close)
                for one, other in zip(measured.weights, again.weights, strict=True)
            )
            if not same or not again.unexplained <= self._close:
                return None

        def measure(cut: Sequence[int], of: Samples) -> tuple[float, ...]:
            return self._measures.of(cut, of, split)[index].weights

        return Count(
            weighting=LossWeighting.MEASURED, of=lambda _part, size: float(size), measured=measure
        )

    def _nearest(self, measured: Measured) -> Count:
        """Return the count that explains the most, if something else mixes as well."""
        samples = self._setup.samples
        offs = [
            (measured.off(shares), count)
            for count in candidates(samples, self._weights_of_classes())
            # What one sample of a list holds is no count of the batch.
            if not _ONE_SAMPLE.search(count.text or "")
            if (shares := count.shares(self._cut, samples)) is not None
        ]
        # Which place of a sequence is left out is too fine a question while samples mix.
        return min(offs, key=lambda pair: pair[0] * (2 if "[:, " in (pair[1].text or "") else 1))[1]

    def _weights_of_classes(self) -> list[torch.Tensor]:
        """Return possible weights of classes: short vectors that the loss or the model keeps."""
        found: list[torch.Tensor] = []
        for holder in (*held_by(self._setup.loss, self._setup.model), self._setup.model):
            if isinstance(holder, nn.Module):
                found += (buffer for buffer in holder.buffers() if buffer.ndim == 1)
                found += (
                    value
                    for module in holder.modules()
                    for value in vars(module).values()
                    if isinstance(value, torch.Tensor)
                )
            elif isinstance(holder, torch.Tensor):
                found.append(holder)
        return [
            one
            for one in found
            if one.ndim == 1 and one.is_floating_point() and 1 < len(one) <= _MOST_CLASSES
        ][:_MOST_HELD]


def _weights(
    measured: Sequence[Measured], counts: Sequence[Count | None], *, inside: bool = False
) -> Weights:
    assert None not in counts
    known = [count for count in counts if count is not None]
    terms = tuple(
        LossTerm(
            name=one.name,
            weighting=count.weighting,
            counts=count.text,
            unexplained=one.unexplained,
            inside=inside,
        )
        for one, count in zip(measured, known, strict=True)
    )
    return Weights(terms=terms, counts=tuple(known))
