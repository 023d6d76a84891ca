"""Which changes to a step would free most at its peak, each of them simulated.

Activation functions in place are not among them: autograd keeps a ReLU's output whether or not it
was written over its input, which nobody keeps, so that the peak is the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from memfit.backends.simulated import SimulatedBackend
from memfit.errors import MemfitError
from memfit.records import Change, MemoryProfile, Precision, Role, StepOptions
from memfit.step import timm_models
from memfit.step.workload import TrainingStep

__all__ = ["advise"]

_NUM_CHANGES = 3
_MIN_SHARE = 0.01
_SMALL_CLASSIFIER = 10
# Lion keeps one number for every parameter, and Adafactor one for every row and column.
_LIGHTER_OPTIMIZERS = (("lion", 1.0), ("adafactor", 0.1))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A change to try.

    Args:
        title: What to change.
        how: The option that does it.
        cost: What it costs.
        step: The step with it.
        bound_bytes: The most that it could free: what it bears on.
        needs_fused_attention: It is to be traced with timm's fused attention allowed.
    """

    title: str
    how: str
    cost: str
    step: TrainingStep
    bound_bytes: int
    needs_fused_attention: bool = False


def advise(
    profile: MemoryProfile, step: TrainingStep, backend: SimulatedBackend
) -> tuple[Change, ...]:
    """Return the changes that free most, the best first.

    Args:
        profile: The step as it is, simulated on the card or measured on one like it.
        step: The step.
        backend: The card.

    Returns:
        At most three; none frees less than a hundredth of the peak.
    """
    context_bytes = backend.gpu.context_bytes
    now = backend.needed_bytes(step, profile.batch_size)
    least = _MIN_SHARE * now
    found: list[Change] = []
    candidates = sorted(_candidates(profile, step, backend), key=lambda c: -c.bound_bytes)
    for candidate in candidates:
        worst = found[_NUM_CHANGES - 1].freed_bytes if len(found) >= _NUM_CHANGES else least
        if candidate.bound_bytes <= worst:
            break
        try:
            needed = _needed_bytes(candidate, profile.batch_size, backend)
        except MemfitError:
            # A model without the switch.
            continue
        if now - needed < least:
            continue
        found.append(
            Change(
                title=candidate.title,
                how=candidate.how,
                cost=candidate.cost,
                total_bytes=needed + context_bytes,
                freed_bytes=now - needed,
            )
        )
        found.sort(key=lambda change: -change.freed_bytes)
    return tuple(found[:_NUM_CHANGES])


def _needed_bytes(candidate: _Candidate, batch_size: int, backend: SimulatedBackend) -> int:
    if not candidate.needs_fused_attention:
        return backend.needed_bytes(candidate.step, batch_size)
    # The step is the same to a cache of traces, so this one has a cache of its own.
    with timm_models.fused_attention():
        return SimulatedBackend(backend.gpu).needed_bytes(candidate.step, batch_size)


def _candidates(
    profile: MemoryProfile, step: TrainingStep, backend: SimulatedBackend
) -> Iterator[_Candidate]:
    options = step.options
    held = profile.peak.bytes_of
    reserved = profile.peak.reserved_bytes
    loose = held(Role.FRAGMENTATION) + held(Role.WORKSPACES)

    def change(**changes: Any) -> TrainingStep:
        return dataclasses.replace(step, options=dataclasses.replace(options, **changes))

    if not options.grad_checkpointing:
        yield _Candidate(
            title="Recompute activations in backward",
            how="--grad-checkpointing",
            cost="forward runs twice: about a third more time",
            step=change(grad_checkpointing=True),
            bound_bytes=held(Role.ACTIVATIONS) + held(Role.TEMPORARIES) + loose,
        )
    yield from _precisions(options, change, reserved, backend)
    if isinstance(step.subject, str) and not timm_models.uses_fused_attention():
        yield _Candidate(
            title="Fused attention, which timm was told not to use",
            how="TIMM_FUSED_ATTN=1",
            cost="none known; attention gets faster",
            step=step,
            bound_bytes=held(Role.ACTIVATIONS) + held(Role.TEMPORARIES) + loose,
            needs_fused_attention=True,
        )
    lighter = _lighter_optimizer(profile)
    if options.optimizer is not None and lighter is not None:
        yield _Candidate(
            title=f"Train with {lighter} in place of {options.optimizer}",
            how=f"--optimizer {lighter}",
            cost="another optimizer: its learning rate has to be found anew",
            step=change(optimizer=lighter),
            bound_bytes=held(Role.OPTIMIZER_STATE)
            + (held(Role.TEMPORARIES) if profile.peak.phase == "optimizer" else 0),
        )
    if not options.channels_last:
        yield _Candidate(
            title="Train in channels_last",
            how="--channels-last",
            cost="none known; convolutions in half precision get faster",
            step=change(channels_last=True),
            bound_bytes=loose,
        )
    if isinstance(step.subject, str) and (options.num_classes or 0) != _SMALL_CLASSIFIER:
        yield _Candidate(
            title=f"A classifier of {_SMALL_CLASSIFIER} classes, if that is all there are",
            how=f"--num-classes {_SMALL_CLASSIFIER}",
            cost="only for data with so few classes",
            step=change(num_classes=_SMALL_CLASSIFIER),
            bound_bytes=_classifier_bytes(profile),
        )


def _precisions(
    options: StepOptions,
    change: Callable[..., TrainingStep],
    reserved: int,
    backend: SimulatedBackend,
) -> Iterator[_Candidate]:
    mixed = backend.auto_precision
    if options.precision is Precision.FP32:
        yield _Candidate(
            title="Mixed precision",
            how=f"--precision {mixed.value}",
            cost="activations in half the bits; weights stay in fp32",
            step=change(precision=mixed),
            bound_bytes=reserved,
        )
    if options.precision is not Precision.BF16 and backend.gpu.has_bf16:
        yield _Candidate(
            title="Weights, gradients and optimizer state in bf16",
            how="--precision bf16",
            cost="weights keep 8 bits of precision: small updates are lost",
            step=change(precision=Precision.BF16),
            bound_bytes=reserved,
        )


def _lighter_optimizer(profile: MemoryProfile) -> str | None:
    """Return an optimizer with clearly less state for every parameter, if there is one."""
    held = profile.peak.bytes_of(Role.OPTIMIZER_STATE)
    numbers = held / max(1, profile.peak.bytes_of(Role.PARAMETERS))
    names = [name for name, kept in _LIGHTER_OPTIMIZERS if numbers > 1.5 * kept + 0.1]
    return names[0] if names else None


def _classifier_bytes(profile: MemoryProfile) -> int:
    """What modules hold that timm's models call their classifier, and the loss."""
    names = {"head", "fc", "classifier", "head.fc", "(loss)"}
    return sum(share.num_bytes for share in profile.peak.modules if share.module in names)
