"""The verification itself: which experiments run, on which batch, and in which order.

The first round runs in float64 on the CPU, where every difference is an error. The next round runs
in the precision and on the device of training, where a difference is an error if rounding does not
explain it. The verification does not judge how well a model trains with or without accumulation.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import torch

from memfit.equivalence.gradient_flow import cut_off as layers_cut_off
from memfit.equivalence.loops import AccumulationLoop
from memfit.equivalence.passes import compare, in_eval
from memfit.equivalence.proof import Proof, proven
from memfit.equivalence.subject import Subject
from memfit.equivalence.whole_and_cut import Compared, PassCounter, Progress, united
from memfit.errors import UsageError
from memfit.memory.restore import preserved
from memfit.records import Equivalence, GradientFault, Verdict
from memfit.step.training_step import TrainingStep

__all__ = ["verify"]

_FAULT_IN_TRAINING = {True: GradientFault.DETACHES, False: GradientFault.UNEXPLAINED}
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
        subject = Subject.of(step, micro_batch_size, accumulation_steps, samples)
        # A model on a GPU is moved off it for the time of the proof.
        kept.release_replaced()
        work = PassCounter(progress)
        proof = proven(subject, work, freeze=freeze_bn, accumulate=accumulate)
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
        used_smaller_images=proof.used_smaller,
        replayed=united(compared.replayed, trained.replayed),
        switched_off=united(compared.switched_off, trained.switched_off),
        held_fixed=united(compared.fixed, trained.fixed),
        draws_on_host=compared.drawn_by_host or trained.drawn_by_host,
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


# --- the precision and the device of training ---------------------------------------------------


def _in_training(
    subject: Subject, work: PassCounter, device: torch.device, proof: Proof
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
            is_decided=bool(proof.causes.faults),
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
