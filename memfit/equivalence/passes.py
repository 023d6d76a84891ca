"""Compares gradients in one precision, with random draws replayed, held fixed or switched off.

`memfit.equivalence.verification` decides in which precisions.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from memfit.equivalence.calls import LOSS
from memfit.equivalence.gradients import CheckSetup
from memfit.equivalence.mixing import layer_name
from memfit.equivalence.randomness import Draws
from memfit.equivalence.weighting import Weights
from memfit.equivalence.whole_and_cut import Compared, FirstPass, PassCounter, run_round
from memfit.memory import oom

__all__ = ["compare", "in_eval"]


def compare(
    setup: CheckSetup,
    cuts: Sequence[tuple[int, ...]],
    weights: Weights,
    work: PassCounter,
    *,
    suspect_draws: bool,
    is_decided: bool,
    is_proof: bool = False,
    vanishing: frozenset[str] = frozenset(),
    first: FirstPass | None = None,
) -> tuple[Compared, CheckSetup]:
    """Compare gradients, with random draws replayed, held fixed or switched off.

    Args:
        setup: The step to run.
        cuts: How its batch is cut.
        weights: What the loss averages over.
        work: The counter that is told what runs next.
        suspect_draws: No other reason is known why gradients could differ. If they differ, draws
            may have been replayed for the wrong samples.
        is_decided: It is known that gradients differ. Passes that can only confirm it do not run.
        is_proof: The verdict rests on this precision.
        vanishing: Parameters whose gradient is known to be zero apart from rounding.
        first: The pass of the whole batch, if it has run.

    Returns:
        The valid comparisons, and the step that ran in them.
    """
    off: set[str] = set()
    replayed: tuple[Compared, CheckSetup] | None = None
    before: tuple[Compared, CheckSetup] | None = None
    while True:
        try:
            with in_eval(setup.model, off):
                compared = run_round(
                    setup,
                    cuts,
                    weights,
                    work,
                    is_decided=is_decided,
                    is_proof=is_proof,
                    vanishing=vanishing,
                    first=first,
                )
        except Exception as error:
            if before is None or oom.classify(error) is not oom.Likelihood.NO:
                raise
            return before  # in evaluation mode, a layer of a detector computes no losses
        first = None
        draws = setup.draws
        compared = dataclasses.replace(
            compared,
            drawing=frozenset(draws.drawing) | off,
            off=frozenset(off),
            held_fixed=draws.held_fixed,
            not_replayed=tuple(layer_name(name) for name in draws.not_replayable),
        )
        more = set(draws.not_replayable) - off - {LOSS}
        equal = compared.passed and not compared.order_matters
        hold = False
        if more:
            before = before or (compared, setup)
            off |= more
        elif equal or draws.held_fixed or not (suspect_draws and draws.drawing):
            # A layer may not work with one value for all; then the replayed draws count.
            return (compared, setup) if equal or replayed is None else replayed
        else:
            replayed, hold = (compared, setup), True
        again = Draws(setup.model, setup.num_samples, held_fixed=hold or draws.held_fixed)
        setup = dataclasses.replace(setup, draws=again)


@contextlib.contextmanager
def in_eval(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Put some layers, but not the layers inside them, in evaluation mode."""
    layers = [module for name, module in model.named_modules() if layer_name(name) in names]
    layers += [module for name, module in model.named_modules() if not name and "" in names]
    before = [layer.training for layer in layers]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training
