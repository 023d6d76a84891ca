"""One round of a verification: a batch runs whole and cut, in one precision, and is compared.

`memfit.equivalence.verification` decides which rounds and which other experiments run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import nn

from memfit.equivalence.calls import LOSS
from memfit.equivalence.comparison import ceiling_of, check, vanishing_in
from memfit.equivalence.gradient_flow import DetachWatch
from memfit.equivalence.gradients import CheckSetup, Gradients, SingleSampleError, gradients
from memfit.equivalence.mixing import layer_name
from memfit.equivalence.randomness import Draws
from memfit.equivalence.splits import written
from memfit.equivalence.weighting import Weights
from memfit.errors import DoesNotFitError, WorkloadError
from memfit.memory import oom
from memfit.memory.release import release
from memfit.records import BufferDrift, GradientCheck

__all__ = ["Compared", "PassCounter", "Progress", "compare", "in_eval", "united"]

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


def compare(
    bench: CheckSetup,
    cuts: Sequence[tuple[int, ...]],
    weights: Weights,
    work: PassCounter,
    *,
    suspect_draws: bool,
    is_proof: bool = False,
    vanishing: frozenset[str] = frozenset(),
) -> tuple[Compared, CheckSetup]:
    """Compare gradients, with random draws replayed, held fixed or switched off.

    Args:
        bench: The step to run.
        cuts: How its batch is cut.
        weights: What the loss averages over.
        work: The counter that is told what runs next.
        suspect_draws: No other reason is known why gradients could differ. If they differ, draws
            may have been replayed for the wrong samples.
        is_proof: The verdict rests on this precision, so every check runs.
        vanishing: Parameters whose gradient is known to be zero apart from rounding.

    Returns:
        The valid comparisons, and the step that ran in them.
    """
    off: set[str] = set()
    replayed: tuple[Compared, CheckSetup] | None = None
    before: tuple[Compared, CheckSetup] | None = None
    while True:
        try:
            with in_eval(bench.model, off):
                compared = _compare_once(bench, cuts, weights, work, vanishing, is_proof=is_proof)
        except Exception as error:
            if before is None or oom.classify(error) is not oom.Likelihood.NO:
                raise
            return before  # in evaluation mode, a layer of a detector computes no losses
        draws = bench.draws
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
            before = before or (compared, bench)
            off |= more
        elif equal or draws.held_fixed or not (suspect_draws and draws.drawing):
            # A layer may not work with one value for all; then the replayed draws count.
            return (compared, bench) if equal or replayed is None else replayed
        else:
            replayed, hold = (compared, bench), True
        again = Draws(bench.model, bench.num_samples, held_fixed=hold or draws.held_fixed)
        bench = dataclasses.replace(bench, draws=again)


def _compare_once(
    bench: CheckSetup,
    cuts: Sequence[tuple[int, ...]],
    weights: Weights,
    work: PassCounter,
    vanishing: frozenset[str],
    *,
    is_proof: bool,
) -> Compared:
    message = None
    reference_cut: tuple[int, ...] = (bench.num_samples,)

    def run(cut: tuple[int, ...]) -> Gradients:
        work.next(f"{bench.precision_name}: {written(cut)}")
        return gradients(bench, cut, weights=weights.of(cut, bench.samples))

    with DetachWatch(bench.model) as whole_watch:
        reference = _unless_out_of_memory(run, reference_cut)
    if reference is None:
        release(bench.device)
        message = (
            f"The full batch of {bench.num_samples} does not fit {bench.device}, so "
            "two ways to cut it are compared instead."
        )
        reference_cut, cuts = cuts[0], cuts[1:]
        reference = _unless_out_of_memory(run, reference_cut)
    if reference is None:
        raise DoesNotFitError(
            f"A micro-batch of {max(reference_cut)} does not fit {bench.device}. "
            "Give a smaller one."
        )
    others: dict[tuple[int, ...], Gradients] = {}
    with DetachWatch(bench.model) as watch:
        others[cuts[0]] = run(cuts[0])
        for cut in cuts[1:]:
            result, why = _unless_refused(run, cut)
            if result is not None:
                others[cut] = result
            message = why or message

    def checked(shuffled: Gradients | None) -> dict[tuple[int, ...], GradientCheck]:
        return {
            cut: check(
                bench,
                reference,
                other,
                shuffled=shuffled,
                reference_cut=reference_cut,
                cut=cut,
                vanishing=vanishing,
                is_proof=is_proof,
                message=message,
            )
            for cut, other in others.items()
        }

    checks = checked(None)
    order_error = None
    # In the proof, another order of the samples is always tried. In other precisions it is tried
    # only if a check failed, because it takes one more pass. It shows rounding that layers amplify.
    if is_proof or not all(one.passed for one in checks.values()):
        work.next(f"{bench.precision_name}: the samples in another order")
        shuffled = _reordered(bench, reference_cut, weights)
        checks = checked(shuffled)
        if shuffled is not None and is_proof:
            order_error = check(
                bench,
                reference,
                shuffled,
                shuffled=None,
                reference_cut=reference_cut,
                cut=reference_cut,
                vanishing=vanishing,
                is_proof=True,
            ).worst_relative_error
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
        order_matters=order_error is not None
        and not order_error <= ceiling_of(bench, is_proof=True),
        detaching=detaching,
        detaching_at_times=tuple(name for name in watch.layers if name not in whole_watch.layers),
        unreached=unreached,
        cut_off=_cut_off(bench, unreached, detaching),
        vanishing=vanishing_in(bench, reference),
        drifts=_drifts(reference, others[cuts[0]]),
        num_losses=len(weights.counts),
        drawn_by_host=bench.draws.by_host,
        batch_changed=bench.draws.batch_changed,
    )


def _reordered(bench: CheckSetup, cut: tuple[int, ...], weights: Weights) -> Gradients | None:
    """Return the reference's gradients with the samples in another order, if there is one."""
    size = bench.num_samples
    # No sample keeps its place, its neighbours, or its partner in a pair.
    even, odd = range(0, size, 2), range(1, size, 2)
    order = [2, 1, 0] if size == 3 else [*reversed(even), *reversed(odd)]  # noqa: PLR2004
    if size == 2:  # noqa: PLR2004 - a pair has one other order
        order = [1, 0]
    try:
        turned = bench.reordered(torch.tensor(order))
    except WorkloadError:
        return None  # the user's own function cuts this batch, so it cannot be reordered
    return gradients(
        turned, cut, weights=weights.of(cut, turned.samples), order=torch.tensor(order)
    )


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
    bench: CheckSetup, unreached: Collection[str], detaching: Collection[str]
) -> tuple[str, ...]:
    """Return the parameters that forward uses and that a layer keeps gradients from.

    A parameter whose gradient is zero for every batch, such as an added constant whose derivative
    vanishes, does not count.
    """
    parameters, used = bench.parameters(), bench.draws.used
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


def united(*groups: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of several groups, each once, in order of first appearance."""
    return tuple(dict.fromkeys(name for group in groups for name in group))
