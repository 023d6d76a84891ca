"""How every backend measures: the training step repeated until its peak has settled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from memfit.step.draws import ENDS, Draws
from memfit.step.runner import PreparedStep

__all__ = ["Reading", "steady_readings"]

_MIN_ITERATIONS = 2
_MAX_ITERATIONS = 6
# Two peaks agree if they differ by at most this share: allocators round, and pages vary a little.
_AGREEMENT_SHARE = 0.02


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one iteration took.

    Args:
        reserved_bytes: Peak of what was taken of the device's capacity.
        allocated_bytes: Peak of what was handed out of that.
        requested_bytes: Peak of what tensors asked for; `None` where it is not known.
        seconds: How long the iteration took.
        num_device_calls: How often memory was asked of the device or given back to it up to then.
            `None` where only the peaks decide whether the next iteration is needed.
    """

    reserved_bytes: int
    allocated_bytes: int
    requested_bytes: int | None
    seconds: float
    num_device_calls: int | None = None


def steady_readings(
    prepared: PreparedStep, batch_size: int, measured: Callable[[Callable[[], None]], Reading]
) -> tuple[tuple[Reading, ...], bool]:
    """Iterate a training step until the peaks of the last two iterations agree.

    A step that draws what it computes (LayerDrop) is run with its draws at both ends of their range
    too, so that the largest reading is that of the most that it can compute.

    The optimizer's state appears in the first step and belongs to the peak from the second
    iteration on. A growth by that state is expected. Any other growth means that the peak has not
    settled. Where calls of the device are counted, the iterations go on until one makes no call, or
    until two peaks are the same to the byte: near the edge, fragments can still move. A simulation
    replays as many.

    Args:
        prepared: The step, begun.
        batch_size: Samples in each micro-batch.
        measured: Runs one iteration and reads what it took.

    Returns:
        The readings, and whether the peak still grew when the iterations were used up.
    """
    draws = Draws()
    readings: list[Reading] = []

    def iterate(draws: Draws) -> None:
        with prepared.drawing(draws):
            readings.append(measured(lambda: prepared.iterate(batch_size)))

    prepared.peak_varies = False
    state_bytes = prepared.optimizer_state_bytes
    iterate(draws)
    if draws.num_seen:
        state_bytes = prepared.optimizer_state_bytes - state_bytes
        return _worst_readings(prepared, readings, iterate, state_bytes)
    grows = True
    while (grows or not _is_steady(readings)) and len(readings) < _MAX_ITERATIONS:
        state_bytes = prepared.optimizer_state_bytes
        readings.append(measured(lambda: prepared.iterate(batch_size)))
        growth = readings[-1].reserved_bytes - readings[-2].reserved_bytes
        expected = state_bytes if len(readings) == _MIN_ITERATIONS else 0
        grows = growth > expected + _AGREEMENT_SHARE * readings[-1].reserved_bytes
    return tuple(readings), grows


def _is_steady(readings: list[Reading]) -> bool:
    """Whether another iteration would be the same, as far as calls of the device can tell.

    `StepSchedule.until_settled` asks the same of a replay.
    """
    before, last = readings[-2:]
    if last.num_device_calls is None or last.num_device_calls == before.num_device_calls:
        return True
    return len(readings) > _MIN_ITERATIONS and last.reserved_bytes == before.reserved_bytes


def _worst_readings(
    prepared: PreparedStep,
    readings: list[Reading],
    iterate: Callable[[Draws], None],
    state_bytes: int,
) -> tuple[tuple[Reading, ...], bool]:
    """Iterate a step that draws what it computes, at both ends of what it can draw.

    Args:
        prepared: The step.
        readings: What its first iteration took; the others are added.
        iterate: Runs an iteration and adds its reading.
        state_bytes: Optimizer state that the first iteration made.
    """
    # The last of the two ends once more, to see whether the peak has settled.
    for share in (*ENDS, ENDS[-1]):
        iterate(Draws(share))
    growth = readings[-1].reserved_bytes - readings[-2].reserved_bytes
    grows = growth > _AGREEMENT_SHARE * readings[-1].reserved_bytes
    peaks = [reading.reserved_bytes for reading in readings[1:]]
    prepared.peak_varies = max(peaks) - readings[0].reserved_bytes > (
        state_bytes + _AGREEMENT_SHARE * max(peaks)
    )
    return tuple(readings), grows
