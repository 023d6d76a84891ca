"""The memory that each batch size needs, on every card that the user asks for."""

from __future__ import annotations

from collections.abc import Sequence

from memfit import search
from memfit.backends.simulated import SimulatedBackend
from memfit.records import CardLine, Outcome, Trial
from memfit.step.training_step import TrainingStep

__all__ = ["card_lines"]

_NUM_PARTS = 9
_BEYOND_THE_EDGE = 1.2


def card_lines(
    steps: Sequence[tuple[SimulatedBackend, TrainingStep]], batch_size: int
) -> tuple[CardLine, ...]:
    """Draw the line of every card.

    Args:
        steps: The cards, each with the step that runs on it. The step's precision is chosen.
        batch_size: A batch size at which every line has a point.

    Returns:
        Lines through the same batch sizes. They end a little beyond the largest batch size that
        fits any of the cards.

    Raises:
        UnsupportedError: The step cannot be traced without values.
    """
    if not steps:
        return ()
    edges = [_edge(backend, step) for backend, step in steps]
    last = max(batch_size, *(1 if edge is None else edge.batch_size for edge in edges))
    last = max(2, round(last * _BEYOND_THE_EDGE))
    grid = {
        1,
        batch_size,
        *(1 + round((last - 1) * part / _NUM_PARTS) for part in range(_NUM_PARTS + 1)),
    }
    return tuple(
        CardLine(
            gpu=backend.device_name,
            precision=step.options.precision.value,
            total_bytes=backend.gpu.total_bytes,
            points=tuple(
                (size, backend.needed_bytes(step, size) + backend.gpu.context_bytes)
                for size in sorted(grid)
            ),
            max_batch_size=None if edge is None else edge.batch_size,
            max_batch_bytes=None
            if edge is None
            else (edge.peak_reserved_bytes or 0) + backend.gpu.context_bytes,
        )
        for (backend, step), edge in zip(steps, edges, strict=True)
    )


def _edge(backend: SimulatedBackend, step: TrainingStep) -> Trial | None:
    """Return the trial of the largest batch size that fits."""

    def trial(size: int) -> Trial:
        return backend.trial(step, size)

    if trial(1).outcome is Outcome.OUT_OF_MEMORY and trial(2).outcome is Outcome.OUT_OF_MEMORY:
        return None
    found = search.find_largest(
        trial,
        capacity_bytes=backend.capacity().usable_bytes,
        hint=backend.expected_edge(step),
        ceiling=search.DEFAULT_CEILING,
        has_retries=backend.has_retries,
    )
    return None if found.batch_size is None else trial(found.batch_size)
