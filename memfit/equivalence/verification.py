"""The verification itself: which experiments run, on which batch, and in which order.

The first round runs in float64 on the CPU, where every difference is an error. The next round runs
in the precision and on the device of training, where a difference is an error if rounding does not
explain it. The verification does not judge how well a model trains with or without accumulation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from memfit.equivalence import loops, weighting
from memfit.equivalence.causes import Causes, error_by_samples, find_causes, scaling_layers
from memfit.equivalence.counting import UnseenClassError
from memfit.equivalence.gradient_flow import cut_off as layers_cut_off
from memfit.equivalence.gradients import CheckSetup, error_in
from memfit.equivalence.loops import AccumulationLoop
from memfit.equivalence.mixing import NUM_SAMPLES, mixing_layers
from memfit.equivalence.passes import Compared, PassCounter, Progress, compare, in_eval, united
from memfit.equivalence.randomness import Draws, seed_all
from memfit.equivalence.samples import Samples, made_distinct, moved_off_zero
from memfit.equivalence.splits import bounded, splits_of
from memfit.equivalence.weighting import Weights
from memfit.equivalence.widening import in_float64, widen
from memfit.errors import UsageError, WorkloadError
from memfit.memory import oom
from memfit.memory.restore import preserved
from memfit.records import (
    Equivalence,
    GradientFault,
    LoopFault,
    LoopWindow,
    MixingLayer,
    Precision,
    Verdict,
)
from memfit.step import batches
from memfit.step.training_step import StepParts, TrainingStep

__all__ = ["verify"]

_CPU = torch.device("cpu")
_FP64_SAMPLES = 8
_FAULT_IN_TRAINING = {True: GradientFault.DETACHES, False: GradientFault.UNEXPLAINED}
_NUM_LISTED_BUFFERS = 10
_CLOSE = {True: 1e-9, False: 1e-5}  # what rounding changes in a layer, in float64 and float32


def verify(
    step: TrainingStep,
    device: torch.device,
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    samples: int | None = None,
    freeze_bn: bool = False,
    accumulate: AccumulationLoop | None = None,
    progress: Progress | None = None,
) -> Equivalence:
    """Compare the gradients of accumulated micro-batches with the full batch's.

    Afterwards the user's model, optimizer, gradients, random states and switches are the same as
    before.

    Args:
        step: The step to verify, with its precision chosen.
        device: Where training will run.
        micro_batch_size: Samples in each micro-batch, at least 1.
        accumulation_steps: Micro-batches before each optimizer step, at least 2.
        samples: The most samples that any comparison runs on; `None` for 8 in float64 and the
            whole effective batch in the precision of training.
        freeze_bn: Before gradients are compared, put layers that mix samples in evaluation mode, if
            they do not mix in that mode.
        accumulate: The user's own accumulation loop, to be checked as well.
        progress: A function that is told what runs next.

    Returns:
        The verdict, with all results that it is based on.

    Raises:
        UsageError: A number is not valid.
        WorkloadError: The model, batch and loss make no training step, or the loop trains nothing.
        DoesNotFitError: Not even a micro-batch fits the device.
    """
    _check_numbers(micro_batch_size, accumulation_steps, samples)
    began = time.perf_counter()
    with preserved(*step.live_modules, optimizer=step.live_optimizer) as kept, _eager():
        subject = _Subject.of(step, micro_batch_size, accumulation_steps, samples)
        # A model on a GPU is moved off it for the time of the proof.
        kept.release_replaced()
        work = PassCounter(progress)
        proof = _proven(subject, work, freeze=freeze_bn, accumulate=accumulate)
        trained = _in_training(subject, work, device, proof)
    compared, causes = proof.compared, proof.causes
    checks = (*compared.checks, *trained.checks)
    passed = not causes.faults and trained.passed and not proof.loop_faults
    faults = causes.faults
    if not trained.passed and not faults:
        faults = (_FAULT_IN_TRAINING[bool(trained.detaching_at_times)],)
    cut_off = compared.cut_off
    detaching = united(compared.detaching, trained.detaching) or layers_cut_off(
        subject.model, cut_off
    )
    verdict = Verdict.DIFFERS
    if passed:
        verdict = Verdict.DETACHED if cut_off else Verdict.EQUAL
    return Equivalence(
        subject=step.name,
        verdict=verdict,
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation_steps,
        options=step.options,
        device=_device_name(device),
        weighting=(causes.weights or proof.weights).weighting,
        terms=(causes.weights or proof.weights).terms,
        off_by_samples=proof.off_by_samples,
        checks=checks,
        faults=faults,
        order_error=compared.order_error,
        mixing_layers=proof.mixing_layers,
        buffers=compared.drifts[:_NUM_LISTED_BUFFERS],
        num_drifting_buffers=len(compared.drifts),
        unreached=compared.unreached,
        detaching=detaching if cut_off else united(causes.detaching, trained.detaching_at_times),
        stateful=causes.stateful,
        carried=causes.carried,
        changes_batch=compared.batch_changed,
        single_precision=proof.single_precision,
        replayed=united(compared.replayed, trained.replayed),
        switched_off=united(compared.switched_off, trained.switched_off),
        held_fixed=united(compared.fixed, trained.fixed),
        num_moved_parameters=subject.num_moved,
        num_jittered_samples=subject.num_jittered,
        loop=proof.loop,
        loop_faults=proof.loop_faults,
        alternatives=step.batch_norm_free_variants if proof.mixing_layers else (),
        seconds=time.perf_counter() - began,
        torch_version=torch.__version__,
    )


def _check_numbers(micro_batch_size: int, accumulation_steps: int, samples: int | None) -> None:
    if micro_batch_size < 1:
        raise UsageError(f"The micro-batch size must be at least 1, not {micro_batch_size}.")
    if accumulation_steps < 2:  # noqa: PLR2004 - one step is no accumulation
        raise UsageError(
            f"The accumulation steps must be at least 2, not {accumulation_steps}: a single "
            "micro-batch is the full batch."
        )
    if samples is not None and samples < 2:  # noqa: PLR2004 - one sample cannot be cut
        raise UsageError(f"samples must be at least 2, not {samples}: one cannot be cut.")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """What is verified: the step's parts, a batch of different samples, and its cuts."""

    step: TrainingStep
    parts: StepParts
    whole: Samples
    micro_batch_size: int
    accumulation_steps: int
    samples: int | None
    num_jittered: int
    num_moved: int

    @classmethod
    def of(
        cls,
        step: TrainingStep,
        micro_batch_size: int,
        accumulation_steps: int,
        samples: int | None,
    ) -> _Subject:
        seed_all()
        # Weights keep their type; the precision of training is applied in its own check.
        unrounded = dataclasses.replace(step.options, precision=Precision.FP32)
        parts = dataclasses.replace(step, options=unrounded).parts(_CPU)
        if isinstance(parts.loss, nn.Module):
            parts.loss.to(_CPU)
        enough = max(micro_batch_size * accumulation_steps, NUM_SAMPLES)
        whole = Samples(
            batch=parts.place(parts.batch_of(enough)),
            layout=parts.layout_of(enough),
            split=parts.split,
        )
        whole, num_jittered = made_distinct(whole)
        return cls(
            step=step,
            parts=parts,
            whole=whole,
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
            samples=samples,
            num_jittered=num_jittered,
            num_moved=moved_off_zero(parts.model),
        )

    @property
    def model(self) -> nn.Module:
        return self.parts.model

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        loss = self.parts.loss
        return (self.model, *((loss,) if isinstance(loss, nn.Module) else ()))

    @property
    def effective_batch_size(self) -> int:
        return self.micro_batch_size * self.accumulation_steps

    def setup(
        self,
        whole: Samples,
        samples: int | None,
        *,
        device: torch.device,
        precision: Precision | None,
        held_fixed: bool = False,
    ) -> tuple[CheckSetup, tuple[tuple[int, ...], ...]]:
        """Return a check of at most some samples of a batch, and the cuts of these samples."""
        size, count = bounded(self.micro_batch_size, self.accumulation_steps, samples)
        setup = CheckSetup(
            model=self.model,
            loss=self.parts.loss,
            samples=whole.first(size * count),
            device=device,
            precision=precision,
            draws=Draws(self.model, size * count, held_fixed=held_fixed),
        )
        return setup, splits_of(size, count)

    @property
    def training_cuts(self) -> tuple[tuple[int, ...], ...]:
        """The cuts of the batch for the check in the precision of training."""
        return splits_of(*bounded(self.micro_batch_size, self.accumulation_steps, self.samples))


# --- the proof ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Proof:
    """The results of the experiments that the verdict rests on."""

    weights: Weights
    compared: Compared
    causes: Causes
    mixing_layers: tuple[MixingLayer, ...]
    single_precision: str | None
    num_known: int | None
    off_by_samples: float | None
    loop: tuple[LoopWindow, ...]
    loop_faults: tuple[LoopFault, ...]

    @property
    def in_eval(self) -> set[str]:
        """The layers that were in evaluation mode, and must be in it again."""
        return {mixer.name for mixer in self.mixing_layers if mixer.frozen} | self.compared.off


def _proven(
    subject: _Subject, work: PassCounter, *, freeze: bool, accumulate: AccumulationLoop | None
) -> _Proof:
    """Run the experiments in float64, or in float32 if the step cannot run in float64."""
    few = subject.samples or _FP64_SAMPLES
    all_of_it = subject.effective_batch_size
    # Some models take only the batch size that they train on.
    sizes = (few, all_of_it) if few < all_of_it else (few,)
    work.next("looking for layers that mix samples")
    with preserved(*subject.modules):
        for module in subject.modules:
            widen(module)
        doubled = subject.whole.changed(
            lambda batch: batches.to_device(batch, _CPU, dtype=torch.float64)
        )
        with in_float64():
            setups = [subject.setup(doubled, n, device=_CPU, precision=None) for n in sizes]
            chosen, error = _first_that_runs(setups)
            if chosen is not None:
                return _experiments(
                    subject, doubled, chosen, work, freeze=freeze, accumulate=accumulate
                )
    setups = [subject.setup(subject.whole, n, device=_CPU, precision=Precision.FP32) for n in sizes]
    chosen, its_own = _first_that_runs(setups)
    if chosen is None:
        assert its_own is not None
        raise its_own
    why = f"{type(error).__name__}: {error}".partition("\n")[0]
    with preserved(*subject.modules):
        proof = _experiments(
            subject, subject.whole, chosen, work, freeze=freeze, accumulate=accumulate
        )
    return dataclasses.replace(proof, single_precision=why)


_Chosen = tuple[CheckSetup, tuple[tuple[int, ...], ...]]


def _first_that_runs(setups: Sequence[_Chosen]) -> tuple[_Chosen | None, Exception | None]:
    """Return the first batch that runs forward and backward, or the error of the last one."""
    error: Exception | None = None
    for chosen in setups:
        error = error_in(chosen[0])
        if error is None:
            return chosen, None
    return None, error


def _experiments(
    subject: _Subject,
    whole: Samples,
    chosen: _Chosen,
    work: PassCounter,
    *,
    freeze: bool,
    accumulate: AccumulationLoop | None,
) -> _Proof:
    model = subject.model
    setup, cuts = chosen
    mixing = _mixing(model, whole, freeze=freeze, close=_CLOSE[setup.precision is None])
    frozen = {mixer.name for mixer in mixing if mixer.frozen}
    with in_eval(model, frozen):
        work.next("looking at what the loss averages over")
        known = any(not mixer.frozen for mixer in mixing)
        weights = weighting.of_step(setup, cuts[-1], is_mixing=known)
        if weights.mixer is not None:
            mixing = (*mixing, *(scaling_layers(setup) or (weights.mixer,)))
        left = [mixer for mixer in mixing if not mixer.frozen]
        setup = dataclasses.replace(setup, draws=Draws(model, setup.num_samples))
        compared, setup = compare(setup, cuts, weights, work, suspect_draws=not left, is_proof=True)
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
    return _Proof(
        weights=weights,
        compared=compared,
        causes=causes,
        mixing_layers=(*mixing, *causes.mixing_layers),
        single_precision=None,
        num_known=num_known,
        off_by_samples=off_by_samples,
        loop=loop,
        loop_faults=faults,
    )


def _mixing(
    model: nn.Module, samples: Samples, *, freeze: bool, close: float
) -> tuple[MixingLayer, ...]:
    """Name the layers that mix, and tell which of them do not mix in evaluation mode."""
    try:
        found = mixing_layers(model, samples, close=close)
    except Exception as error:
        if oom.classify(error) is not oom.Likelihood.NO:
            raise
        return ()  # the model does not run on the few samples of the search
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


# --- the precision and the device of training ---------------------------------------------------


def _in_training(
    subject: _Subject, work: PassCounter, device: torch.device, proof: _Proof
) -> Compared:
    place = subject.step.convert(subject.model, device)
    for module in subject.modules[1:]:
        module.to(device)
    setup, cuts = subject.setup(
        subject.whole.changed(place),
        proof.num_known,
        device=device,
        precision=subject.step.options.precision,
        held_fixed=proof.compared.held_fixed,
    )
    with in_eval(subject.model, proof.in_eval):
        return compare(
            setup,
            cuts,
            proof.weights,
            work,
            suspect_draws=proof.compared.passed,
            vanishing=proof.compared.vanishing,
        )[0]


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Run compiled models without compilation, because single layers are watched."""
    # The import takes seconds, and if a model was compiled, it was imported already.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
