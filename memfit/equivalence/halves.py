"""Finds layers whose outputs for a sample depend on where the batch was cut.

`memfit.equivalence.mixing` exchanges single samples. Some layers are not found that way: a layer
that divides by the largest value of the batch, or one that decides by the batch's mean. Here the
whole batch runs, and then each half of it. A layer is named if its outputs for a half differ from
its outputs for the same samples in the whole. The outputs are then restored before the next layer
sees them, so that each layer is judged by itself.
"""

from __future__ import annotations

import torch
from torch import nn

from memfit.equivalence.blame import Blame, ValuePlace
from memfit.equivalence.mixing import (
    MixingSearch,
    is_unseen,
    judged_again,
    named_layers,
    with_values,
)
from memfit.equivalence.randomness import Draws
from memfit.equivalence.samples import Samples
from memfit.records import MixingLayer

__all__ = ["layers_that_see_the_cut", "rows_of"]


def layers_that_see_the_cut(
    model: nn.Module, samples: Samples, *, close: float
) -> tuple[MixingLayer, ...]:
    """Name the layers whose outputs for a half of the batch are not those of the whole batch.

    Args:
        model: The model, in the mode in which it trains.
        samples: The batch: at least two samples.
        close: The largest change that counts as rounding, relative to an output.

    Returns:
        The layers, in order of first appearance.
    """
    search = _Search(model, samples, close)
    found = search.found(frozenset())
    inside = frozenset(maker for maker, (_, is_inside) in found.items() if is_inside)
    if inside:
        # A layer that sorts samples by their values, and puts them back, is judged by its outputs.
        found = judged_again(found, search.found(inside), inside)
    moved = {name: far for name, (far, _) in found.items() if name not in search.drawing}
    return named_layers(model, moved)


class _Search:
    """Runs a batch whole and in halves, and compares the values that layers pass on."""

    def __init__(self, model: nn.Module, samples: Samples, close: float) -> None:
        self._model = model
        self._samples = samples
        self._close = close
        self._draws = Draws(model, samples.num_samples)
        self._before: dict[ValuePlace, torch.Tensor] = {}

    @property
    def drawing(self) -> dict[str, None]:
        """The layers that draw random numbers."""
        return self._draws.drawing

    def found(self, unseen: frozenset[str]) -> dict[str, tuple[float, bool]]:
        """Return the layers whose values changed, how far, and whether between inner layers.

        Args:
            unseen: Layers that are judged by their outputs alone.
        """
        size, half = self._samples.num_samples, self._samples.num_samples // 2

        def note(_maker: str, place: ValuePlace, leaf: torch.Tensor) -> torch.Tensor:
            self._before[place] = leaf.detach().clone()
            return leaf

        with self._draws.recorded():
            search = MixingSearch(note, is_repeating=True)
            search.run(self._model, self._samples.of(0, size)[0])
        return self._in_part(0, half, unseen) | self._in_part(half, size, unseen)

    def _in_part(
        self, start: int, stop: int, unseen: frozenset[str]
    ) -> dict[str, tuple[float, bool]]:
        found: dict[str, tuple[float, bool]] = {}
        blame = Blame()

        def visit(maker: str, place: ValuePlace, leaf: torch.Tensor) -> torch.Tensor:
            old = self._before.get(place)
            if old is None or is_unseen(maker, place, unseen):
                return leaf
            rows = rows_of(old, leaf, start, stop, self._samples.num_samples)
            other_shape = rows is None and old.shape != leaf.shape
            maker = blame.of(maker, place, has_other_shape=other_shape)
            if rows is None:
                return leaf
            norm = float(torch.linalg.vector_norm(rows)) or 1.0
            moved = float(torch.linalg.vector_norm(leaf.detach() - rows)) / norm
            if not moved > self._close:
                return leaf
            so_far, is_inside = found.get(maker, (0.0, False))
            found[maker] = max(so_far, moved), is_inside or place[2] == "in"
            return with_values(leaf, rows)

        with self._draws.replayed(start, stop):
            MixingSearch(visit, is_repeating=True).run(
                self._model, self._samples.of(start, stop)[0]
            )
        return found


def rows_of(
    old: torch.Tensor, leaf: torch.Tensor, start: int, stop: int, size: int
) -> torch.Tensor | None:
    """Return the rows of a whole batch's value that belong to a part.

    Args:
        old: The value of the whole batch.
        leaf: The same value of a part.
        start: The part's first sample.
        stop: The sample after its last one.
        size: Samples in the whole batch.

    Returns:
        The rows; `None` if the value has none.
    """
    if old.ndim != leaf.ndim:
        return None
    longer = [d for d, (a, b) in enumerate(zip(old.shape, leaf.shape, strict=True)) if a != b]
    if len(longer) != 1:
        return None
    dim = longer[0]
    per_sample, rest = divmod(old.shape[dim], size)
    if rest or leaf.shape[dim] != per_sample * (stop - start):
        return None
    return old.narrow(dim, start * per_sample, leaf.shape[dim])
