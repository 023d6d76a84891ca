"""Which changes to a step would free most at its peak, each of them simulated.

Activation functions in place are not among them: autograd keeps a ReLU's output whether or not it
was written over its input, which nobody keeps, so that the peak is the same.
"""

from __future__ import annotations

from memfit.backends.simulated import SimulatedBackend
from memfit.errors import MemfitError
from memfit.planning import ChangeKind, StepChange, changes_of
from memfit.records import Change, MemoryProfile, Role
from memfit.step import timm_models
from memfit.step.workload import TrainingStep

__all__ = ["advise"]

_NUM_CHANGES = 3
_MIN_SHARE = 0.01


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
    bounded = [(_bound_bytes(change.kind, profile), change) for change in changes_of(step, backend)]
    for bound_bytes, change in sorted(bounded, key=lambda pair: -pair[0]):
        worst = found[_NUM_CHANGES - 1].freed_bytes if len(found) >= _NUM_CHANGES else least
        if bound_bytes <= worst:
            break
        try:
            needed = _needed_bytes(change, profile.batch_size, backend)
        except MemfitError:
            # A model without the switch.
            continue
        if now - needed < least:
            continue
        found.append(
            Change(
                title=change.title,
                how=change.how,
                cost=change.cost,
                total_bytes=needed + context_bytes,
                freed_bytes=now - needed,
            )
        )
        found.sort(key=lambda change: -change.freed_bytes)
    return tuple(found[:_NUM_CHANGES])


def _needed_bytes(change: StepChange, batch_size: int, backend: SimulatedBackend) -> int:
    if not change.needs_fused_attention:
        return backend.needed_bytes(change.step, batch_size)
    # The step is the same to a cache of traces, so this one has a cache of its own.
    with timm_models.fused_attention():
        return SimulatedBackend(backend.gpu).needed_bytes(change.step, batch_size)


def _bound_bytes(kind: ChangeKind, profile: MemoryProfile) -> int:
    """Return the most that a kind of change could free: what it bears on."""
    held = profile.peak.bytes_of
    loose = held(Role.FRAGMENTATION) + held(Role.WORKSPACES)
    in_passes = held(Role.ACTIVATIONS) + held(Role.TEMPORARIES) + loose
    bounds = {
        ChangeKind.LAYOUT: loose,
        ChangeKind.FUSED_ATTENTION: in_passes,
        ChangeKind.PRECISION: profile.peak.reserved_bytes,
        ChangeKind.WEIGHTS: profile.peak.reserved_bytes,
        ChangeKind.CHECKPOINTING: in_passes,
        ChangeKind.IMAGE_SIZE: in_passes + held(Role.INPUTS),
        ChangeKind.OPTIMIZER: held(Role.OPTIMIZER_STATE)
        + (held(Role.TEMPORARIES) if profile.peak.phase == "optimizer" else 0),
        ChangeKind.CLASSIFIER: _classifier_bytes(profile),
    }
    return bounds[kind]


def _classifier_bytes(profile: MemoryProfile) -> int:
    """What modules hold that timm's models call their classifier, and the loss."""
    names = {"head", "fc", "classifier", "head.fc", "(loss)"}
    return sum(share.num_bytes for share in profile.peak.modules if share.module in names)
