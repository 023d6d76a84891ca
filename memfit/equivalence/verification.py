"""The verification itself: which experiments run, on what, and in which order.

In float64 on the CPU first, where whatever differs is wrong; then in the precision and on the
device of training, where whatever differs by more than rounding is. It does not judge how well a
model trains with the one or the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from memfit.equivalence import loops, weighting
from memfit.equivalence.comparison import check
from memfit.equivalence.gradient_flow import stateful_layers
from memfit.equivalence.gradients import CheckSetup, gradients
from memfit.equivalence.loops import AccumulationLoop
from memfit.equivalence.mixing import NUM_SAMPLES, mixing_gradients, mixing_layers
from memfit.equivalence.passes import Compared, PassCounter, Progress, compare, in_eval, united
from memfit.equivalence.randomness import Draws, seed_all
from memfit.equivalence.samples import made_distinct, moved_off_zero, widen
from memfit.equivalence.splits import bounded, splits_of
from memfit.equivalence.weighting import Weights
from memfit.errors import UsageError
from memfit.memory.restore import preserved, rewound
from memfit.records import (
    Equivalence,
    LoopFault,
    LoopWindow,
    LossWeighting,
    MixingLayer,
    Precision,
    Verdict,
)
from memfit.step import batches
from memfit.step.runner import call_model
from memfit.step.workload import StepParts, TrainingStep

__all__ = ["verify"]

_CPU = torch.device("cpu")
_FP64_SAMPLES = 8
_NUM_LISTED_BUFFERS = 10


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

    The user's model, optimizer, gradients, random states and switches are as before afterwards.

    Args:
        step: What is trained; its precision chosen.
        device: Where training will run.
        micro_batch_size: Samples in each micro-batch, at least 1.
        accumulation_steps: Micro-batches before each optimizer step, at least 2.
        samples: The most samples that any comparison runs on; `None` for 8 in float64 and the
            whole effective batch in the precision of training.
        freeze_bn: Put the layers that are found to mix, and that stop when they are in evaluation
            mode, in that mode before gradients are compared.
        accumulate: The user's own accumulation loop, to be weighed as well.
        progress: Told what runs next.

    Returns:
        The verdict and everything it rests on.

    Raises:
        UsageError: A number that cannot be.
        WorkloadError: The model, batch and loss make no training step, or the loop trains nothing.
        DoesNotFitError: Not even a micro-batch fits the device.
    """
    _check_numbers(micro_batch_size, accumulation_steps, samples)
    began = time.perf_counter()
    with preserved(*step.live_modules, optimizer=step.live_optimizer) as kept, _eager():
        subject = _Subject.of(step, micro_batch_size, accumulation_steps, samples)
        # A model that came from a GPU leaves it for the time being.
        kept.release_replaced()
        work = PassCounter(progress)
        proof = _in_float64(subject, work, freeze=freeze_bn, accumulate=accumulate)
        trained = _in_training(subject, work, device, proof)
    compared = proof.compared
    checks = (*compared.checks, *trained.checks)
    passed = compared.passed and trained.passed and not proof.loop_faults
    detaching = united(compared.detaching, trained.detaching)
    if compared.unreached and detaching:
        verdict = Verdict.DETACHED if passed else Verdict.DIFFERS
    else:
        verdict = Verdict.EQUAL if passed else Verdict.DIFFERS
    return Equivalence(
        subject=step.name,
        verdict=verdict,
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation_steps,
        options=step.options,
        device=_device_name(device),
        weighting=proof.weights.weighting,
        checks=checks,
        mixing_layers=proof.mixing_layers,
        buffers=compared.drifts[:_NUM_LISTED_BUFFERS],
        num_drifting_buffers=len(compared.drifts),
        unreached=compared.unreached,
        detaching=detaching if compared.unreached or not passed else (),
        stateful=proof.stateful,
        replayed=united(compared.replayed, trained.replayed),
        switched_off=united(compared.switched_off, trained.switched_off),
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
    if accumulation_steps < 2:  # noqa: PLR2004 - one is no accumulation
        raise UsageError(
            f"The accumulation steps must be at least 2, not {accumulation_steps}: a single "
            "micro-batch is the full batch."
        )
    if samples is not None and samples < 2:  # noqa: PLR2004 - one cannot be cut
        raise UsageError(f"samples must be at least 2, not {samples}: one cannot be cut.")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """What is verified: the step's parts, one batch of different samples, and how to cut it."""

    step: TrainingStep
    parts: StepParts
    batch: Any
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
        # Weights as they are: the precision of training is applied when that is checked.
        unrounded = dataclasses.replace(step.options, precision=Precision.FP32)
        parts = dataclasses.replace(step, options=unrounded).parts(_CPU)
        if isinstance(parts.loss, nn.Module):
            parts.loss.to(_CPU)
        enough = max(micro_batch_size * accumulation_steps, NUM_SAMPLES + 1)
        batch, num_jittered = made_distinct(parts.place(parts.batch_of(enough)), parts.split)
        return cls(
            step=step,
            parts=parts,
            batch=batch,
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

    @property
    def cut(self) -> tuple[int, ...]:
        """The effective batch, cut unevenly where that is possible."""
        return splits_of(self.micro_batch_size, self.accumulation_steps)[-1]

    def bench(
        self,
        batch: Any,
        samples: int | None,
        *,
        device: torch.device,
        precision: Precision | None,
    ) -> tuple[CheckSetup, tuple[tuple[int, ...], ...]]:
        """Return what runs at most some samples of a batch, and how these are cut."""
        size, count = bounded(self.micro_batch_size, self.accumulation_steps, samples)
        inputs, targets = self.parts.split(batches.take(batch, 0, size * count))
        bench = CheckSetup(
            model=self.model,
            loss=self.parts.loss,
            inputs=inputs,
            targets=targets,
            num_samples=size * count,
            device=device,
            precision=precision,
            draws=Draws(self.model, size * count),
        )
        return bench, splits_of(size, count)


# --- float64 ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Proof:
    """What the experiments in float64 gave."""

    weights: Weights
    compared: Compared
    mixing_layers: tuple[MixingLayer, ...]
    stateful: tuple[str, ...]
    loop: tuple[LoopWindow, ...]
    loop_faults: tuple[LoopFault, ...]

    @property
    def in_eval(self) -> set[str]:
        """Layers that were in evaluation mode, and have to be again."""
        return {mixer.name for mixer in self.mixing_layers if mixer.frozen} | self.compared.off


def _in_float64(
    subject: _Subject, work: PassCounter, *, freeze: bool, accumulate: AccumulationLoop | None
) -> _Proof:
    model = subject.model
    with preserved(*subject.modules):
        for module in subject.modules:
            widen(module)
        batch = batches.to_device(subject.batch, _CPU, dtype=torch.float64)
        few = batches.take(subject.parts.split(batch)[0], 0, NUM_SAMPLES + 1)
        work.next("looking for layers that mix samples")
        mixing_layers = _mixers(model, few, freeze=freeze)
        frozen = {mixer.name for mixer in mixing_layers if mixer.frozen}
        with in_eval(model, frozen):
            work.next("looking at what the loss averages over")
            bench, cuts = subject.bench(
                batch, subject.samples or _FP64_SAMPLES, device=_CPU, precision=None
            )
            weights = _weights(subject, batch) or _weights_from_gradients(bench, cuts[-1])
            if weights.mixer is not None:
                mixing_layers = (*mixing_layers, weights.mixer)
            unexplained = all(mixer.frozen for mixer in mixing_layers)
            compared = compare(bench, cuts, weights, work, suspect_draws=unexplained)
            stateful: tuple[str, ...] = ()
            if unexplained and not compared.passed:
                work.next("looking for another reason")
                stateful = stateful_layers(model, few)
                mixing_layers = (*mixing_layers, *mixing_gradients(model, few))
        loop: tuple[LoopWindow, ...] = ()
        faults: tuple[LoopFault, ...] = ()
        if accumulate is not None:
            work.next("weighing the accumulation loop")
            with in_eval(model, frozen | compared.drawing):
                loop, faults = loops.weigh(
                    accumulate,
                    model=model,
                    loss=subject.parts.loss,
                    batch=batches.take(batch, 0, subject.effective_batch_size),
                    split=subject.parts.split,
                    weights=weights,
                    parameters=tuple(bench.parameters().values()),
                    micro_batch_size=subject.micro_batch_size,
                    accumulation_steps=subject.accumulation_steps,
                )
    return _Proof(
        weights=weights,
        compared=compared,
        mixing_layers=mixing_layers,
        stateful=stateful,
        loop=loop,
        loop_faults=faults,
    )


def _mixers(model: nn.Module, inputs: Any, *, freeze: bool) -> tuple[MixingLayer, ...]:
    """Name the layers that mix, and say which of them evaluation mode stops."""
    found = mixing_layers(model, inputs)
    if not found:
        return ()
    with in_eval(model, {mixer.name for mixer in found}):
        still = {mixer.name for mixer in mixing_layers(model, inputs)}
    return tuple(
        dataclasses.replace(
            mixer,
            stops_in_eval=mixer.name not in still,
            frozen=freeze and mixer.name not in still,
        )
        for mixer in found
    )


def _weights(subject: _Subject, batch: Any) -> Weights | None:
    """Ask the loss what it averages over, on the outputs of a few samples."""
    effective = batches.take(batch, 0, subject.effective_batch_size)
    inputs, targets = subject.parts.split(effective)
    few = min(NUM_SAMPLES + 1, subject.effective_batch_size)
    with rewound(*subject.modules), torch.no_grad():
        outputs = call_model(subject.model, batches.take(inputs, 0, few))
    if not weighting.can_be_cut(outputs, few):
        return None
    return weighting.of_loss(subject.parts.loss, outputs, targets, subject.cut)


def _weights_from_gradients(bench: CheckSetup, cut: tuple[int, ...]) -> Weights:
    """Choose the rule under which an uneven cut agrees, for a model that computes its own loss."""
    reference = gradients(bench, (bench.num_samples,), weights=(1.0,))
    labels = weighting.with_ignored((bench.inputs, bench.targets))
    errors: dict[LossWeighting, float] = {}
    for rule in (LossWeighting.SAMPLES, LossWeighting.SUM, LossWeighting.TARGETS):
        if rule is LossWeighting.TARGETS and not labels:
            continue
        weights = weighting.weights_by(rule, cut, labels)
        other = gradients(bench, cut, weights=weights)
        compared = check(
            bench, reference, other, shuffled=reference, reference_cut=(bench.num_samples,), cut=cut
        )
        errors[rule] = compared.worst_relative_error
    return Weights(weighting=min(errors, key=errors.__getitem__), labels_in_inputs=True)


# --- the precision and the device of training ---------------------------------------------------


def _in_training(
    subject: _Subject, work: PassCounter, device: torch.device, proof: _Proof
) -> Compared:
    place = subject.step.convert(subject.model, device)
    for module in subject.modules[1:]:
        module.to(device)
    bench, cuts = subject.bench(
        place(subject.batch),
        subject.samples,
        device=device,
        precision=subject.step.options.precision,
    )
    with in_eval(subject.model, proof.in_eval):
        return compare(
            bench,
            cuts,
            proof.weights,
            work,
            suspect_draws=proof.compared.passed,
            vanishing=proof.compared.vanishing,
        )


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Run compiled models uncompiled: layers are watched one by one."""
    # Importing the compiler takes seconds, and a model that was compiled has done so.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
