"""The experiments that a verdict rests on, in float64 on the CPU.

Every difference is an error there, not rounding.

A timm model may take images of any size. Then layers that mix are looked for on smaller images. If
some are found, the verdict is known, and the other experiments use the smaller images as well: they
say how far off gradients are, and look for further causes. If none are found, gradients are
compared on images of the size that was asked for.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from memfit.equivalence import loops, weighting
from memfit.equivalence.causes import Causes, error_by_samples, find_causes, scaling_layers
from memfit.equivalence.counting import UnseenClassError
from memfit.equivalence.gradients import CheckSetup, SingleSampleError, gradients
from memfit.equivalence.loops import AccumulationLoop
from memfit.equivalence.mixing import mixing_layers
from memfit.equivalence.passes import compare, in_eval
from memfit.equivalence.randomness import Draws
from memfit.equivalence.samples import Samples
from memfit.equivalence.subject import CPU, Subject
from memfit.equivalence.weighting import Weights
from memfit.equivalence.whole_and_cut import Compared, FirstPass, PassCounter
from memfit.equivalence.widening import in_float64, widen
from memfit.errors import MemfitError, WorkloadError
from memfit.memory import oom
from memfit.memory.restore import preserved
from memfit.records import LoopFault, LoopWindow, MixingLayer, Precision
from memfit.step import batches

__all__ = ["Proof", "proven"]

_FP64_SAMPLES = 8
_CLOSE = {True: 1e-9, False: 1e-5}  # what rounding changes in a layer, in float64 and float32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The results of the experiments that the verdict rests on.

    Args:
        weights: What the loss averages over.
        compared: The comparison of gradients.
        causes: Why they differ.
        mixing_layers: The layers, or the loss, that mix samples.
        single_precision: Why float32 was used; `None` if float64 was.
        used_smaller: The images were smaller than in training.
        num_known: The most samples that weights are known for; `None` if there is no limit.
        off_by_samples: How far gradients are off if samples are the weights.
        loop: The result of the user's own loop.
        loop_faults: The faults of that loop.
    """

    weights: Weights
    compared: Compared
    causes: Causes
    mixing_layers: tuple[MixingLayer, ...]
    single_precision: str | None
    used_smaller: bool
    num_known: int | None
    off_by_samples: float | None
    loop: tuple[LoopWindow, ...]
    loop_faults: tuple[LoopFault, ...]

    @property
    def in_eval(self) -> set[str]:
        """The layers that were in evaluation mode, and must be in it again."""
        return {mixer.name for mixer in self.mixing_layers if mixer.frozen} | self.compared.off


def proven(
    subject: Subject, work: PassCounter, *, freeze: bool, accumulate: AccumulationLoop | None
) -> Proof:
    """Run the experiments in float64, or in float32 if the step cannot run in float64.

    Args:
        subject: What is verified.
        work: The counter that is told what runs next.
        freeze: Put layers that mix samples in evaluation mode, if they do not mix in that mode.
        accumulate: The user's own accumulation loop.

    Returns:
        The results.

    Raises:
        WorkloadError: The model, batch and loss make no training step, or the loop trains nothing.
    """
    work.next("looking for layers that mix samples")
    with preserved(*subject.modules):
        for module in subject.modules:
            widen(module)
        with in_float64():
            mixing, batches_to_try = _searched(subject, freeze=freeze)
            error: Exception | None = None
            for whole in batches_to_try:
                chosen, error = _first_that_runs(subject, whole, work, precision=None)
                if chosen is None:
                    continue
                proof = _experiments(subject, whole, chosen, mixing, work, accumulate=accumulate)
                is_last = whole is batches_to_try[-1]
                # Layers may mix and leave the gradients as they are.
                if is_last or proof.causes.faults:
                    return dataclasses.replace(proof, used_smaller=not is_last)
    chosen, its_own = _first_that_runs(subject, subject.whole, work, precision=Precision.FP32)
    if chosen is None:
        assert its_own is not None
        raise its_own
    why = f"{type(error).__name__}: {error}".partition("\n")[0]
    with preserved(*subject.modules):
        mixing = _mixing(subject.model, subject.whole, freeze=freeze, is_float64=False) or ()
        proof = _experiments(subject, subject.whole, chosen, mixing, work, accumulate=accumulate)
    return dataclasses.replace(proof, single_precision=why)


def _searched(
    subject: Subject, *, freeze: bool
) -> tuple[tuple[MixingLayer, ...], tuple[Samples, ...]]:
    """Look for layers that mix; return them, and the batches for the other experiments in order."""
    whole = _doubled(subject.whole)
    found = None
    if subject.smaller is not None:
        smaller = _doubled(subject.smaller)
        found = _mixing(subject.model, smaller, freeze=freeze, is_float64=True)
        if found and not all(mixer.frozen for mixer in found):
            return found, (smaller, whole)
    if found is None:
        found = _mixing(subject.model, whole, freeze=freeze, is_float64=True)
    return found or (), (whole,)


def _doubled(samples: Samples) -> Samples:
    return samples.changed(lambda batch: batches.to_device(batch, CPU, dtype=torch.float64))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """A batch that runs, its cuts, and its first pass."""

    setup: CheckSetup
    cuts: tuple[tuple[int, ...], ...]
    first: FirstPass


def _first_that_runs(
    subject: Subject, whole: Samples, work: PassCounter, *, precision: Precision | None
) -> tuple[_Chosen | None, Exception | None]:
    """Return the first batch that runs forward and backward, or the error of the last one."""
    few, all_of_it = subject.samples or _FP64_SAMPLES, subject.effective_batch_size
    error: Exception | None = None
    # Some models take only the batch size that they train on.
    for size in (few, all_of_it) if few < all_of_it else (few,):
        setup, cuts = subject.setup(whole, size, device=CPU, precision=precision)
        work.next(f"{setup.precision_name}: {size}")
        try:
            first = _first_pass(setup)
        except Exception as raised:
            if isinstance(raised, MemfitError) or oom.classify(raised) is not oom.Likelihood.NO:
                raise
            error = raised
            continue
        return _Chosen(setup=setup, cuts=cuts, first=first), None
    return None, error


def _first_pass(setup: CheckSetup) -> FirstPass:
    """Run the whole batch.

    Raises:
        WorkloadError: All gradients are zero, and zeros are equal whatever the step does.
    """
    first = FirstPass.of(setup, lambda: gradients(setup, (setup.num_samples,)))
    assert first.gradients is not None
    found = [value for value in first.gradients.values.values() if value is not None]
    if found and not any(bool(value.any()) for value in found):
        raise WorkloadError(
            "Every gradient of the example batch is zero, so there is nothing to compare. A loss "
            "with a margin may have nothing to push apart here: give a batch, or a margin, for "
            "which the loss has a gradient."
        )
    return first


def _experiments(
    subject: Subject,
    whole: Samples,
    chosen: _Chosen,
    mixing: tuple[MixingLayer, ...],
    work: PassCounter,
    *,
    accumulate: AccumulationLoop | None,
) -> Proof:
    model = subject.model
    setup, cuts = chosen.setup, chosen.cuts
    frozen = {mixer.name for mixer in mixing if mixer.frozen}
    with in_eval(model, frozen):
        work.next("looking at what the loss averages over")
        known = any(not mixer.frozen for mixer in mixing)
        # The draws of the first pass are kept, because micro-batches replay them.
        apart = dataclasses.replace(setup, draws=Draws(model, setup.num_samples))
        weights = _weights_of(apart, cuts[-1], is_mixing=known)
        if weights.mixer is not None and apart.draws.drawing:
            # The draws may have been replayed for the wrong samples.
            fixed = Draws(model, setup.num_samples, held_fixed=True)
            apart = dataclasses.replace(setup, draws=fixed)
            weights = _weights_of(apart, cuts[-1], is_mixing=known)
        if weights.mixer is not None:
            mixing = (*mixing, *(scaling_layers(apart) or (weights.mixer,)))
        left = [mixer for mixer in mixing if not mixer.frozen]
        compared, setup = compare(
            setup,
            cuts,
            weights,
            work,
            suspect_draws=not left,
            is_decided=bool(left),
            is_proof=True,
            first=None if frozen else chosen.first,
        )
        with in_eval(model, compared.off):
            causes = find_causes(setup, compared, weights, left, work)
            off_by_samples = error_by_samples(setup, compared, weights)
        # In training, only as many samples are used as the weights are known for.
        num_known = subject.samples
        try:
            weights = weights.plan((*cuts, *subject.training_cuts), whole)
        except UnseenClassError:
            weights, num_known = weights.plan(cuts, whole), setup.num_samples
    loop: tuple[LoopWindow, ...] = ()
    faults: tuple[LoopFault, ...] = ()
    if accumulate is not None:
        if num_known != subject.samples:
            raise WorkloadError(
                "The loss weighs classes, and the weights of some were not seen in the first "
                f"{num_known} samples: put every class among them, or give samples=."
            )
        work.next("weighing the accumulation loop")
        with in_eval(model, frozen | compared.drawing):
            loop, faults = loops.weigh(
                accumulate,
                setup=dataclasses.replace(setup, samples=whole.first(subject.effective_batch_size)),
                weights=dataclasses.replace(weights, planned={}),
                micro_batch_size=subject.micro_batch_size,
                accumulation_steps=subject.accumulation_steps,
            )
    return Proof(
        weights=weights,
        compared=compared,
        causes=causes,
        mixing_layers=(*mixing, *causes.mixing_layers),
        single_precision=None,
        used_smaller=False,
        num_known=num_known,
        off_by_samples=off_by_samples,
        loop=loop,
        loop_faults=faults,
    )


def _weights_of(setup: CheckSetup, cut: tuple[int, ...], *, is_mixing: bool) -> Weights:
    """Find out what the losses average over, from parts that the model takes."""
    try:
        return weighting.of_step(setup, cut, is_mixing=is_mixing)
    except SingleSampleError:
        # If the model computes its loss itself, it runs on the parts.
        last = max(2, setup.num_samples // 3)
        without_singles = (setup.num_samples - last, last)
        if min(cut) > 1 or min(without_singles) < 2:  # noqa: PLR2004 - a single sample
            raise
    return weighting.of_step(setup, without_singles, is_mixing=is_mixing)


def _mixing(
    model: nn.Module, samples: Samples, *, freeze: bool, is_float64: bool
) -> tuple[MixingLayer, ...] | None:
    """Name the layers that mix, and tell which of them do not mix in evaluation mode.

    Returns:
        The layers; `None` if the model does not run on the few samples of the search.
    """
    close = _CLOSE[is_float64]
    try:
        found = mixing_layers(model, samples, close=close)
    except Exception as error:
        if oom.classify(error) is not oom.Likelihood.NO:
            raise
        return None
    if not found:
        return ()
    try:
        with in_eval(model, {mixer.name for mixer in found}):
            still = {mixer.name for mixer in mixing_layers(model, samples, close=close)}
    except Exception as error:
        if oom.classify(error) is not oom.Likelihood.NO:
            raise
        return found  # the layers do not run in evaluation mode
    return tuple(
        dataclasses.replace(
            mixer,
            stops_in_eval=mixer.name not in still,
            frozen=freeze and mixer.name not in still,
        )
        for mixer in found
    )
