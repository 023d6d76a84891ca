"""Why gradients differ: experiments on a step whose accumulated gradients are not the full batch's.

Each cause is tested separately, so that a step with two causes has both named. `mixing` and
`weighting` have found before what mixes samples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import torch

from memfit.equivalence.backward_cuts import layers_that_scale_gradients
from memfit.equivalence.backward_mixing import mixing_gradients
from memfit.equivalence.comparison import ceiling_of, check
from memfit.equivalence.counting import SAMPLES
from memfit.equivalence.gradient_flow import stateful_layers
from memfit.equivalence.gradients import CheckSetup, Gradients, gradients
from memfit.equivalence.halves import layers_that_see_the_cut
from memfit.equivalence.mixing import NUM_SAMPLES
from memfit.equivalence.state import changed_state, same_start
from memfit.equivalence.weighting import Weights, in_parameters
from memfit.equivalence.whole_and_cut import Compared, PassCounter
from memfit.records import GradientFault, LossWeighting, MixesIn, MixingLayer

__all__ = ["Causes", "error_by_samples", "find_causes", "scaling_layers"]

_CLOSE = {True: 1e-9, False: 1e-5}  # what rounding changes in a layer, in float64 and float32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Causes:
    """What makes gradients differ.

    Args:
        faults: The kinds of causes, each once.
        mixing_layers: Layers that mix and that were not known before.
        stateful: Layers that return a different result when they are called again.
        carried: Parameters, buffers and attributes that forward changes.
        detaching: Layers that cut gradients off in some passes and not in others.
        weights: What the loss averages over, if the parameters' gradients show something else than
            the outputs' (a penalty on the weights); else `None`.
    """

    faults: tuple[GradientFault, ...] = ()
    mixing_layers: tuple[MixingLayer, ...] = ()
    stateful: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    detaching: tuple[str, ...] = ()
    weights: Weights | None = None


def find_causes(
    setup: CheckSetup,
    compared: Compared,
    weights: Weights,
    mixing: Sequence[MixingLayer],
    work: PassCounter,
) -> Causes:
    """Find out why gradients differ.

    Args:
        setup: The step that was run, on the CPU, in the precision that the verdict rests on.
        compared: The comparison of its gradients.
        weights: What its losses average over.
        mixing: Layers that are known to mix and are not frozen.
        work: The counter that is told what runs next.

    Returns:
        The causes; empty if gradients are equal.
    """
    hidden = _hidden_by_draws(compared, mixing)
    # Layers may mix and leave all gradients as they are. If a loss mixes and the gradients agree,
    # then only because of the values of this batch.
    loss_mixes = any(one.mixes_in is MixesIn.LOSS for one in mixing)
    if compared.passed and not (compared.order_matters or hidden or loss_mixes):
        return Causes()
    work.next("looking for the reason")
    carries = _forgetting_helps(setup, compared, weights)
    stateful: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    if carries:
        stateful = stateful_layers(setup.model, setup.samples.first(NUM_SAMPLES))
        with same_start(setup.holders):
            carried = changed_state(setup.model, setup.loss, lambda: _run_once(setup))
    seen = {
        GradientFault.MIXES_SAMPLES: bool(mixing) or hidden,
        GradientFault.DEPENDS_ON_ORDER: compared.order_matters,
        GradientFault.CARRIES_STATE: carries,
        GradientFault.ADDS_DIFFERENT_MEANS: weights.adds_different_means and not compared.passed,
        GradientFault.DETACHES: bool(compared.detaching_at_times) and not compared.passed,
        GradientFault.DRAWS_NOT_REPLAYED: bool(compared.not_replayed),
    }
    faults = [fault for fault, is_so in seen.items() if is_so]
    found: tuple[MixingLayer, ...] = ()
    inside = None
    if not faults:
        found = _mixing_besides(setup)
    if not faults and not found:
        inside = in_parameters(setup, compared.accumulated_cut)
        found = () if inside.mixer is None else (inside.mixer,)
        if inside.adds_different_means:
            faults.append(GradientFault.ADDS_DIFFERENT_MEANS)
    if found:
        faults.append(GradientFault.MIXES_SAMPLES)
    if compared.drawn_by_host and set(faults) <= {GradientFault.DEPENDS_ON_ORDER}:
        # Python and NumPy draw by position, so in another order samples get other draws.
        faults.append(GradientFault.DRAWS_NOT_REPLAYED)
    if set(faults) <= {GradientFault.DEPENDS_ON_ORDER} and not _repeats(setup, compared):
        faults = [GradientFault.DOES_NOT_REPEAT]
    return Causes(
        faults=tuple(faults or [GradientFault.UNEXPLAINED]),
        mixing_layers=found,
        stateful=stateful,
        carried=carried,
        detaching=compared.detaching_at_times if GradientFault.DETACHES in faults else (),
        weights=inside if GradientFault.ADDS_DIFFERENT_MEANS in faults else None,
    )


def error_by_samples(setup: CheckSetup, compared: Compared, weights: Weights) -> float | None:
    """Return how far gradients are off if each micro-batch's loss weighs as its samples do.

    Args:
        setup: The step that was run.
        compared: The comparison of its gradients.
        weights: What its losses average over.

    Returns:
        The norm of the difference of all gradients, relative to the norm of the full batch's;
        `None` if samples are the right weights, or if nothing can be compared.
    """
    cut = compared.accumulated_cut
    by_samples = SAMPLES.shares(cut, setup.samples)
    right = weights.of(cut, setup.samples)
    assert by_samples is not None
    if all(rule is LossWeighting.SAMPLES for rule in weights.rules) or len(cut) == 1:
        return None
    # A part that counts nothing has no mean. Its loss is left out here.
    given = [
        tuple(share if weight else 0.0 for weight in of_part)
        for share, of_part in zip(by_samples, right, strict=True)
    ]
    other = gradients(setup, cut, weights=given)
    apart = whole = 0.0
    for name, reference in compared.reference.values.items():
        value = other.values[name]
        if reference is None or value is None:
            continue
        apart += float(torch.linalg.vector_norm(value - reference)) ** 2
        whole += float(torch.linalg.vector_norm(reference)) ** 2
    return math.sqrt(apart / whole) if whole else None


def _hidden_by_draws(compared: Compared, mixing: Sequence[MixingLayer]) -> bool:
    """Whether a layer mixes, but its draws were switched off or fixed in the comparison."""
    taken_away = bool(compared.off) or compared.held_fixed
    return taken_away and any(one.mixes_in is MixesIn.FORWARD for one in mixing)


def _run_once(setup: CheckSetup) -> None:
    with setup.draws.recorded():
        setup.losses_of(0, setup.num_samples)


def _differ(setup: CheckSetup, one: Gradients, other: Gradients, cut: tuple[int, ...]) -> bool:
    compared = check(setup, one, other, reference_cut=cut, cut=cut, is_proof=True)
    return not compared.worst_relative_error <= ceiling_of(setup, is_proof=True)


def _forgetting_helps(setup: CheckSetup, compared: Compared, weights: Weights) -> bool:
    """Whether accumulated gradients change when each micro-batch begins from the same state."""
    cut = compared.accumulated_cut
    forgetful = gradients(setup, cut, weights=weights.of(cut, setup.samples), forgets=True)
    if _differ(setup, compared.accumulated, forgetful, cut):
        return True
    # The same parts in the same order round alike. So a difference above the bound is no rounding,
    # even if it is far below the ceiling.
    again = check(
        setup,
        forgetful,
        compared.accumulated,
        reference_cut=cut,
        cut=cut,
        is_proof=True,
    )
    return not again.passed and not compared.passed


def _repeats(setup: CheckSetup, compared: Compared) -> bool:
    """Whether the full batch's gradient is the same when it is computed again."""
    whole = compared.reference_cut
    if len(whole) > 1:
        return True
    ones = ((1.0,) * compared.num_losses,)
    again = gradients(setup, whole, weights=ones)
    return not _differ(setup, compared.reference, again, whole)


def _mixing_besides(setup: CheckSetup) -> tuple[MixingLayer, ...]:
    """Look for mixing in backward alone, and for layers that see where the batch was cut."""
    found = mixing_gradients(setup.model, setup.samples.first(NUM_SAMPLES))
    if found:
        return found
    close = _CLOSE[setup.precision is None]
    # The user's own function may cut this batch, and the model may not take its halves.
    with contextlib.suppress(Exception):
        found = layers_that_see_the_cut(setup.model, setup.samples, close=close)
    return found or scaling_layers(setup)


def scaling_layers(setup: CheckSetup) -> tuple[MixingLayer, ...]:
    """Name layers that pass on other gradients for a part of the batch than for the whole.

    If the model computes its loss itself, such a layer looks like a loss that mixes.

    Args:
        setup: The step that was run.
    """
    with contextlib.suppress(Exception):  # the model may not take halves of this batch
        return layers_that_scale_gradients(setup, close=_CLOSE[setup.precision is None])
    return ()
