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

from memfit.equivalence.mixing import MixingSearch, ValuePlace, layer_name, with_values
from memfit.equivalence.randomness import Draws
from memfit.equivalence.samples import Samples
from memfit.records import MixesIn, MixingLayer

__all__ = ["layers_that_see_the_cut"]


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
    size, half = samples.num_samples, samples.num_samples // 2
    draws = Draws(model, size)
    before: dict[ValuePlace, torch.Tensor] = {}
    found: dict[str, float] = {}

    def note(_maker: str, place: ValuePlace, leaf: torch.Tensor) -> torch.Tensor:
        before[place] = leaf.detach().clone()
        return leaf

    def compare(start: int, stop: int) -> None:
        def visit(maker: str, place: ValuePlace, leaf: torch.Tensor) -> torch.Tensor:
            old = before.get(place)
            rows = None if old is None else _rows(old, leaf, start, stop, size)
            if rows is None:
                return leaf
            norm = float(torch.linalg.vector_norm(rows)) or 1.0
            moved = float(torch.linalg.vector_norm(leaf.detach() - rows)) / norm
            if not moved > close:
                return leaf
            found[maker] = max(found.get(maker, 0.0), moved)
            return with_values(leaf, rows)

        with draws.replayed(start, stop):
            MixingSearch(visit, is_repeating=True).run(model, samples.of(start, stop)[0])

    with draws.recorded():
        MixingSearch(note, is_repeating=True).run(model, samples.of(0, size)[0])
    compare(0, half)
    compare(half, size)
    modules = dict(model.named_modules())
    return tuple(
        MixingLayer(
            name=layer_name(name),
            type_name=type(modules[name]).__name__,
            mixes_in=MixesIn.FORWARD,
            moved=moved,
        )
        for name, moved in found.items()
        if name not in draws.drawing
    )


def _rows(
    old: torch.Tensor, leaf: torch.Tensor, start: int, stop: int, size: int
) -> torch.Tensor | None:
    """Return the rows of a whole batch's value that belong to a part; `None` if it has none."""
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
