"""One round of a verification: a batch runs whole and cut, in one precision, and is compared.

`memfit.equivalence.passes` repeats a round if random draws cannot be replayed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from memfit.equivalence.comparison import ceiling_of, check, vanishing_in
from memfit.equivalence.gradient_flow import DetachWatch
from memfit.equivalence.gradients import CheckSetup, Gradients, SingleSampleError, gradients
from memfit.equivalence.mixing import layer_name
from memfit.equivalence.rounding import reordered, rounded_otherwise
from memfit.equivalence.splits import written
from memfit.equivalence.weighting import Weights
from memfit.errors import DoesNotFitError
from memfit.memory import oom
from memfit.memory.release import release
from memfit.records import BufferDrift, GradientCheck

__all__ = ["Compared", "FirstPass", "PassCounter", "Progress", "run_round", "united"]

Progress = Callable[[str, int, int], None]
"""Called with what runs next, the passes done and the passes in all."""

_NUM_PASSES = 4  # the reference, two cuts, and the samples in another order
_NUM_EXPERIMENTS = 2  # on mixing and on the loss, before the first round


class PassCounter:
    """Reports how many passes are done."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._num_done = 0
        self._num_planned = 2 * _NUM_PASSES + _NUM_EXPERIMENTS

    def next(self, what: str) -> None:
        """Report what runs now, and that the pass before is done."""
        if self._progress is not None:
            self._progress(what, self._num_done, max(self._num_planned, self._num_done + 1))
        self._num_done += 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The result of comparing gradients in one precision.

    Args:
        checks: Every comparison.
        reference: The gradients of the full batch, or of the cut that replaces it.
        reference_cut: How the batch of the reference was cut.
        accumulated: The first accumulated gradients that differ; if none differ, the first.
        accumulated_cut: How their batch was cut.
        order_error: How much another order of the samples changed the reference; `None` if that
            was not tried.
        order_matters: This change is more than rounding.
        detaching: Layers that stop gradients.
        detaching_at_times: Layers that stopped gradients in some passes but not in all.
        unreached: Parameters that get no gradient.
        cut_off: Parameters that forward uses and that get no gradient.
        drifts: Buffers that have other values after accumulation.
        vanishing: Parameters whose gradient is zero apart from rounding.
        drawing: Layers that draw random numbers.
        off: Layers whose randomness was switched off.
        held_fixed: Draws were replaced by one value for all samples.
        not_replayed: Layers whose draws could neither be replayed nor switched off.
        drawn_by_host: Python or NumPy drew random numbers.
        batch_changed: Forward or the loss changed the batch in place.
        num_losses: Losses that the loss function returns.
    """

    checks: tuple[GradientCheck, ...]
    reference: Gradients
    reference_cut: tuple[int, ...]
    accumulated: Gradients
    accumulated_cut: tuple[int, ...]
    order_error: float | None
    order_matters: bool
    detaching: tuple[str, ...]
    detaching_at_times: tuple[str, ...]
    unreached: tuple[str, ...]
    cut_off: tuple[str, ...]
    drifts: tuple[BufferDrift, ...]
    vanishing: frozenset[str]
    num_losses: int
    drawing: frozenset[str] = frozenset()
    off: frozenset[str] = frozenset()
    held_fixed: bool = False
    not_replayed: tuple[str, ...] = ()
    drawn_by_host: bool = False
    batch_changed: bool = False

    @property
    def passed(self) -> bool:
        """Whether rounding alone explains every difference."""
        return all(check.passed for check in self.checks)

    @property
    def replayed(self) -> tuple[str, ...]:
        """Layers whose random draws were replayed."""
        return () if self.held_fixed else self._drawing_still

    @property
    def fixed(self) -> tuple[str, ...]:
        """Layers whose random draws were replaced by one value."""
        return self._drawing_still if self.held_fixed else ()

    @property
    def switched_off(self) -> tuple[str, ...]:
        """Layers whose randomness was switched off."""
        return tuple(layer_name(name) for name in sorted(self.off))

    @property
    def _drawing_still(self) -> tuple[str, ...]:
        return tuple(layer_name(name) for name in sorted(self.drawing - self.off))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FirstPass:
    """The pass of a whole batch.

    Args:
        gradients: Its gradients; `None` if it does not fit the device.
        watch: Which layers stopped gradients.
    """

    gradients: Gradients | None
    watch: DetachWatch

    @classmethod
    def of(cls, setup: CheckSetup, run: Callable[[], Gradients | None]) -> FirstPass:
        """Run the pass, and watch where gradients stop."""
        with DetachWatch(setup.model) as watch:
            return cls(gradients=run(), watch=watch)


def run_round(
    setup: CheckSetup,
    cuts: Sequence[tuple[int, ...]],
    weights: Weights,
    work: PassCounter,
    *,
    is_decided: bool,
    is_proof: bool,
    vanishing: frozenset[str],
    first: FirstPass | None,
) -> Compared:
    """Run a batch whole and cut, and compare the gradients.

    Args:
        setup: The step to run.
        cuts: How its batch is cut.
        weights: What the loss averages over.
        work: The counter that is told what runs next.
        is_decided: It is known that gradients differ. Passes that can only confirm it do not run.
        is_proof: The verdict rests on this precision.
        vanishing: Parameters whose gradient is known to be zero apart from rounding.
        first: The pass of the whole batch, if it has run.

    Returns:
        The comparisons.

    Raises:
        DoesNotFitError: Not even a micro-batch fits the device.
    """
    message = None
    reference_cut: tuple[int, ...] = (setup.num_samples,)

    def run(cut: tuple[int, ...]) -> Gradients:
        work.next(f"{setup.precision_name}: {written(cut)}")
        return gradients(setup, cut, weights=weights.of(cut, setup.samples))

    if first is None:
        first = FirstPass.of(setup, lambda: _unless_out_of_memory(run, reference_cut))
    reference, whole_watch = first.gradients, first.watch
    if reference is None:
        release(setup.device)
        message = (
            f"The full batch of {setup.num_samples} does not fit {setup.device}, so "
            "two ways to cut it are compared instead."
        )
        reference_cut, cuts = cuts[0], cuts[1:]
        reference = _unless_out_of_memory(run, reference_cut)
    if reference is None:
        raise DoesNotFitError(
            f"A micro-batch of {max(reference_cut)} does not fit {setup.device}. "
            "Give a smaller one."
        )
    against = _Reference(
        setup=setup,
        gradients=reference,
        cut=reference_cut,
        vanishing=vanishing,
        is_proof=is_proof,
    )
    with DetachWatch(setup.model) as watch:
        others = {cuts[0]: run(cuts[0])}
        checks = against.checks(others, message)
        # Above its ceiling no difference is rounding, and no further pass changes that.
        ceiling = ceiling_of(setup, is_proof=is_proof)
        beyond = is_decided and not checks[cuts[0]].worst_relative_error <= ceiling
        if not beyond:
            others, message = _more_cuts(run, cuts[1:], others, message)
            checks = against.checks(others, message)
    order_error = None
    # In the proof, another order of the samples is always tried. In other precisions rounding that
    # layers amplify is measured only if a check failed, because it takes more passes.
    if is_proof or not (beyond or _all_passed(checks)):
        work.next(f"{setup.precision_name}: the samples in another order")
        shuffled = reordered(setup, reference_cut, weights)
        if shuffled is not None and is_proof:
            order_error = against.check(shuffled, reference_cut).worst_relative_error
        if not beyond:
            checks = against.checks(others, message, shuffled=shuffled)
            if not is_decided and against.may_be_rounding(checks):
                work.next(f"{setup.precision_name}: weights within one rounding")
                rounded = rounded_otherwise(setup, reference_cut, weights)
                checks = against.checks(others, message, shuffled=shuffled, rounded=rounded)
    shown = next((cut for cut, one in checks.items() if not one.passed), cuts[0])
    unreached = tuple(
        name
        for name, value in reference.values.items()
        if value is None and all(other.values[name] is None for other in others.values())
    )
    detaching = _detaching(whole_watch, watch)
    return Compared(
        checks=tuple(checks.values()),
        reference=reference,
        reference_cut=reference_cut,
        accumulated=others[shown],
        accumulated_cut=shown,
        order_error=order_error,
        order_matters=order_error is not None and not order_error <= ceiling,
        detaching=detaching,
        detaching_at_times=tuple(name for name in watch.layers if name not in whole_watch.layers),
        unreached=unreached,
        cut_off=_cut_off(setup, unreached, detaching),
        vanishing=vanishing_in(setup, reference),
        drifts=_drifts(reference, others[cuts[0]]),
        num_losses=len(weights.counts),
        drawn_by_host=setup.draws.by_host,
        batch_changed=setup.draws.batch_changed,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Reference:
    """The gradients that others are compared with, and how."""

    setup: CheckSetup
    gradients: Gradients
    cut: tuple[int, ...]
    vanishing: frozenset[str]
    is_proof: bool

    def check(
        self,
        other: Gradients,
        cut: tuple[int, ...],
        *,
        shuffled: Gradients | None = None,
        rounded: Sequence[Gradients] = (),
        message: str | None = None,
    ) -> GradientCheck:
        """Compare with the gradients of another cut."""
        return check(
            self.setup,
            self.gradients,
            other,
            shuffled=shuffled,
            rounded=rounded,
            reference_cut=self.cut,
            cut=cut,
            vanishing=self.vanishing,
            is_proof=self.is_proof,
            message=message,
        )

    def checks(
        self,
        others: Mapping[tuple[int, ...], Gradients],
        message: str | None,
        *,
        shuffled: Gradients | None = None,
        rounded: Sequence[Gradients] = (),
    ) -> dict[tuple[int, ...], GradientCheck]:
        """Compare with the gradients of several cuts."""
        return {
            cut: self.check(other, cut, shuffled=shuffled, rounded=rounded, message=message)
            for cut, other in others.items()
        }

    def may_be_rounding(self, checks: Mapping[tuple[int, ...], GradientCheck]) -> bool:
        """Whether some checks failed, and more rounding could explain each difference."""
        failed = [one for one in checks.values() if not one.passed]
        highest = ceiling_of(self.setup, is_proof=True) if self.is_proof else math.inf
        return bool(failed) and all(one.worst_relative_error <= highest for one in failed)


def _more_cuts(
    run: Callable[[tuple[int, ...]], Gradients],
    cuts: Sequence[tuple[int, ...]],
    others: Mapping[tuple[int, ...], Gradients],
    message: str | None,
) -> tuple[dict[tuple[int, ...], Gradients], str | None]:
    """Return gradients with those of more cuts, and why some are missing."""
    found = dict(others)
    for cut in cuts:
        result, why = _unless_refused(run, cut)
        if result is not None:
            found[cut] = result
        message = why or message
    return found, message


def _all_passed(checks: Mapping[tuple[int, ...], GradientCheck]) -> bool:
    return all(check.passed for check in checks.values())


def _unless_out_of_memory(
    run: Callable[[tuple[int, ...]], Gradients], cut: tuple[int, ...]
) -> Gradients | None:
    try:
        return run(cut)
    except Exception as error:
        if oom.classify(error) is oom.Likelihood.NO:
            raise
    return None


def _unless_refused(
    run: Callable[[tuple[int, ...]], Gradients], cut: tuple[int, ...]
) -> tuple[Gradients | None, str | None]:
    """Run a cut that the user did not ask for; the model may refuse it."""
    try:
        return run(cut), None
    except SingleSampleError as error:
        return None, f"{error}, so {written(cut)} was not compared."
    except Exception as error:
        if oom.classify(error) is not oom.Likelihood.NO:
            raise
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        return None, f"The step does not take {written(cut)} ({said}), so that was not compared."


def _detaching(*watches: DetachWatch) -> tuple[str, ...]:
    found = united(*(tuple(watch.layers) for watch in watches))
    return found or united(*(tuple(watch.suspects) for watch in watches))


def _cut_off(
    setup: CheckSetup, unreached: Collection[str], detaching: Collection[str]
) -> tuple[str, ...]:
    """Return the parameters that forward uses and that a layer keeps gradients from.

    A parameter whose gradient is zero for every batch, such as an added constant whose derivative
    vanishes, does not count.
    """
    parameters, used = setup.parameters(), setup.draws.used
    return tuple(
        name
        for name in unreached
        if id(parameters[name]) in used and (detaching or not used[id(parameters[name])])
    )


def _drifts(full: Gradients, accumulated: Gradients) -> tuple[BufferDrift, ...]:
    """Compare the buffers after the full batch and after micro-batches, largest change first."""
    found = []
    for name, one in full.buffers.items():
        a, b = accumulated.buffers[name].double().cpu(), one.double().cpu()
        norm = float(torch.linalg.vector_norm(b))
        apart = float(torch.linalg.vector_norm(a - b)) / (norm or 1.0)
        if apart > 1e-9:  # noqa: PLR2004 - more than rounding in float64
            single = b.numel() == 1
            found.append(
                BufferDrift(
                    name=name,
                    relative_change=apart,
                    full=float(b) if single else None,
                    accumulated=float(a) if single else None,
                )
            )
    # Counts of batches differ by design; the statistics matter more.
    found.sort(key=lambda drift: (drift.full is not None, -drift.relative_change))
    return tuple(found)


def united(*groups: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of several groups, each once, in order of first appearance."""
    return tuple(dict.fromkeys(name for group in groups for name in group))
