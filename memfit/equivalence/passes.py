"""One round of a verification: a batch run whole and cut, in one precision, and compared.

Which rounds there are, and what is found out besides, is `memfit.equivalence.verification`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import nn

from memfit.equivalence.comparison import check, vanishing_in
from memfit.equivalence.gradient_flow import DetachWatch
from memfit.equivalence.gradients import CheckSetup, Gradients, SingleSampleError, gradients
from memfit.equivalence.mixing import layer_name
from memfit.equivalence.randomness import Draws
from memfit.equivalence.splits import written
from memfit.equivalence.weighting import Weights
from memfit.errors import DoesNotFitError
from memfit.memory import oom
from memfit.memory.release import release
from memfit.records import BufferDrift, GradientCheck

__all__ = ["Compared", "PassCounter", "Progress", "compare", "in_eval", "united"]

Progress = Callable[[str, int, int], None]
"""Called with what runs next, the passes done and the passes in all."""

_NUM_PASSES = 4  # the reference, two ways to cut it, and its samples in another order
_NUM_EXPERIMENTS = 2  # on mixing and on the loss, before the first round


class PassCounter:
    """How much has been done, told to whoever waits for it."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._num_done = 0
        self._num_planned = 2 * _NUM_PASSES + _NUM_EXPERIMENTS

    def next(self, what: str) -> None:
        """Say what runs now; what ran before is done."""
        if self._progress is not None:
            self._progress(what, self._num_done, max(self._num_planned, self._num_done + 1))
        self._num_done += 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What comparing gradients in one precision gave."""

    checks: tuple[GradientCheck, ...]
    detaching: tuple[str, ...]
    unreached: tuple[str, ...]
    drifts: tuple[BufferDrift, ...]
    vanishing: frozenset[str]
    drawing: frozenset[str] = frozenset()
    off: frozenset[str] = frozenset()

    @property
    def passed(self) -> bool:
        """Whether rounding alone explains every difference."""
        return all(check.passed for check in self.checks)

    @property
    def replayed(self) -> tuple[str, ...]:
        """Layers whose random draws were replayed."""
        return tuple(layer_name(name) for name in sorted(self.drawing - self.off))

    @property
    def switched_off(self) -> tuple[str, ...]:
        """Layers whose randomness was switched off."""
        return tuple(layer_name(name) for name in sorted(self.off))


def compare(
    bench: CheckSetup,
    cuts: Sequence[tuple[int, ...]],
    weights: Weights,
    work: PassCounter,
    *,
    suspect_draws: bool,
    vanishing: frozenset[str] = frozenset(),
) -> Compared:
    """Compare gradients, and where draws cannot be replayed once more without any.

    Args:
        bench: What is run.
        cuts: How its batch is cut.
        weights: What the loss averages over.
        work: Told what runs next.
        suspect_draws: Nothing else is known that would make gradients differ, so that if they do
            it may be that draws were replayed for the wrong samples.
        vanishing: Parameters whose gradient is known to be zero but for rounding.

    Returns:
        The comparisons that hold.
    """
    off: set[str] = set()
    while True:
        with in_eval(bench.model, off):
            compared = _compare_once(bench, cuts, weights, work, vanishing)
        draws = bench.draws
        suspected = suspect_draws and not compared.passed
        more = set(draws.drawing if suspected else draws.not_replayable) - off
        if not more:
            return dataclasses.replace(
                compared, drawing=frozenset(draws.drawing) | off, off=frozenset(off)
            )
        off |= more
        bench = dataclasses.replace(bench, draws=Draws(bench.model, bench.num_samples))


def _compare_once(
    bench: CheckSetup,
    cuts: Sequence[tuple[int, ...]],
    weights: Weights,
    work: PassCounter,
    vanishing: frozenset[str],
) -> Compared:
    message = None
    reference_cut: tuple[int, ...] = (bench.num_samples,)

    def run(cut: tuple[int, ...]) -> Gradients:
        work.next(f"{bench.precision_name}: {written(cut)}")
        return gradients(bench, cut, weights=weights.of(cut, bench.inputs, bench.targets))

    with DetachWatch(bench.model) as whole_watch:
        reference = _unless_out_of_memory(run, reference_cut)
    if reference is None:
        release(bench.device)
        message = (
            f"The full batch of {bench.num_samples} does not fit {bench.device}: two ways to cut "
            "it are compared instead."
        )
        reference_cut, cuts = cuts[0], cuts[1:]
        reference = _unless_out_of_memory(run, reference_cut)
    if reference is None:
        raise DoesNotFitError(
            f"A micro-batch of {max(reference_cut)} does not fit {bench.device}: give a smaller "
            "one."
        )
    others: dict[tuple[int, ...], Gradients] = {}
    with DetachWatch(bench.model) as watch:
        others[cuts[0]] = run(cuts[0])
        for cut in cuts[1:]:
            result, why = _unless_single_sample(run, cut)
            if result is not None:
                others[cut] = result
            message = why or message

    def checked(shuffled: Gradients | None) -> tuple[GradientCheck, ...]:
        return tuple(
            check(
                bench,
                reference,
                other,
                shuffled=shuffled,
                reference_cut=reference_cut,
                cut=cut,
                vanishing=vanishing,
                message=message,
            )
            for cut, other in others.items()
        )

    checks = checked(None)
    if not all(one.passed for one in checks):
        # It may be rounding that the layers amplify: that takes one more pass to tell.
        work.next(f"{bench.precision_name}: the samples in another order")
        checks = checked(_reordered(bench, reference_cut, weights))
    return Compared(
        checks=checks,
        detaching=_detaching(whole_watch, watch),
        unreached=tuple(
            name
            for name, value in reference.values.items()
            if value is None and all(other.values[name] is None for other in others.values())
        ),
        vanishing=vanishing_in(bench, reference),
        drifts=_drifts(reference, next(iter(others.values()))) if others else (),
    )


def _reordered(bench: CheckSetup, cut: tuple[int, ...], weights: Weights) -> Gradients:
    """Return the reference's gradients with the samples in another order."""
    order = torch.arange(bench.num_samples - 1, -1, -1)
    turned = bench.reordered(order)
    return gradients(
        turned, cut, weights=weights.of(cut, turned.inputs, turned.targets), order=order
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


def _unless_single_sample(
    run: Callable[[tuple[int, ...]], Gradients], cut: tuple[int, ...]
) -> tuple[Gradients | None, str | None]:
    try:
        return run(cut), None
    except SingleSampleError as error:
        return None, f"{error}, so {written(cut)} was not compared."


def _detaching(*watches: DetachWatch) -> tuple[str, ...]:
    found = united(*(tuple(watch.layers) for watch in watches))
    return found or united(*(tuple(watch.suspects) for watch in watches))


def _drifts(full: Gradients, accumulated: Gradients) -> tuple[BufferDrift, ...]:
    """Compare what a full batch and its micro-batches made of the buffers, furthest first."""
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
    # Counts of batches differ by design; the statistics are what matters.
    found.sort(key=lambda drift: (drift.full is not None, -drift.relative_change))
    return tuple(found)


@contextlib.contextmanager
def in_eval(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Put some layers, but not what is inside them, in evaluation mode."""
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
