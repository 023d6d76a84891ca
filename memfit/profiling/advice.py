"""Which changes to a step would free most at its peak. Each change is simulated.

In-place activation functions are not among the changes, because they do not lower the peak.
Autograd keeps the output of a ReLU in both cases, and it keeps the input in neither.
"""

from __future__ import annotations

from memfit.backends.simulated import SimulatedBackend
from memfit.errors import MemfitError
from memfit.planning import ChangeKind, StepChange, changes_of
from memfit.records import Change, MemoryProfile, Role
from memfit.step import timm_models
from memfit.step.training_step import TrainingStep

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
        At most three. Each one frees at least a hundredth of the peak.
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
            # This model cannot be changed in this way.
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
    # A cache of traces cannot tell the two steps apart, so this simulation gets its own cache.
    with timm_models.fused_attention():
        return SimulatedBackend(backend.gpu).needed_bytes(change.step, batch_size)


def _bound_bytes(kind: ChangeKind, profile: MemoryProfile) -> int:
    """Return the most bytes that a kind of change could free."""
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
    """Return the bytes of the loss and of the modules that are classifiers in timm's models."""
    names = {"head", "fc", "classifier", "head.fc", "(loss)"}
    return sum(share.num_bytes for share in profile.peak.modules if share.module in names)
