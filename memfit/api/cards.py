"""Opens cards that are not in this machine, rehearsed or simulated as the engine says."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from memfit.api.steps import refuse_rank
from memfit.backends import Backend
from memfit.backends.rehearsed import RehearsalServers, RehearsedBackend
from memfit.backends.rehearsed.parcel import packed
from memfit.backends.simulated import SimulatedBackend
from memfit.backends.traces import TraceCache
from memfit.cards import ANY_GPU, Gpu, find_gpu
from memfit.errors import UnsupportedError, UsageError
from memfit.records import Engine
from memfit.rehearsal.activate import rehearsed_environment
from memfit.step.training_step import TrainingStep

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Cards", "simulated"]


def simulated(gpu: str, memory_bytes: int | None, traces: TraceCache) -> SimulatedBackend:
    """Return a card of the catalogue, simulated.

    Args:
        gpu: The card's name or an alias; `"any"` with `memory_bytes`.
        memory_bytes: The card's memory, instead of the catalogue's value.
        traces: The traces that all cards of one call share.

    Raises:
        UsageError: There is no such card.
    """
    return SimulatedBackend(find_gpu(gpu, total_bytes=memory_bytes), traces=traces)


class Cards:
    """The cards of one call, which share their traces and the process that rehearses.

    Args:
        engine: How cards are tried.
        is_quick: See `TraceCache`.
    """

    def __init__(self, engine: Engine, *, is_quick: bool = False) -> None:
        self._engine = engine
        self._traces = TraceCache(is_quick=is_quick)
        self._stack = contextlib.ExitStack()
        self._servers = RehearsalServers(
            lambda card: rehearsed_environment(card, environment=os.environ)
        )

    def __enter__(self) -> Self:
        """Return the cards."""
        self._stack.enter_context(self._servers)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End the process that rehearses, if there is one."""
        self._stack.close()

    @property
    def traces(self) -> TraceCache:
        """The traces that simulated cards share."""
        return self._traces

    def open(self, gpu: str, memory_bytes: int | None, step: TrainingStep) -> Backend:
        """Return a card as a backend.

        Args:
            gpu: A name of the catalogue; `"any"` with `memory_bytes`.
            memory_bytes: The card's memory, instead of the catalogue's value.
            step: The step that will be tried on the card.

        Raises:
            UsageError: There is no such card, or it cannot be rehearsed.
            UnsupportedError: Rehearsal was asked for, or the step is one rank of many, and this
                system cannot rehearse.
        """
        card = find_gpu(gpu, total_bytes=memory_bytes)
        if self._engine is Engine.SIMULATE:
            refuse_rank(step, "A simulation")
            return SimulatedBackend(card, traces=self._traces)
        is_rank = step.options.parallel is not None
        if is_rank:
            _check_takes_ranks(card, step)
        elif self._engine is Engine.AUTO and not self._can_rehearse(card, step):
            return SimulatedBackend(card, traces=self._traces)
        counterpart = SimulatedBackend(card, traces=self._traces)
        return RehearsedBackend(card, self._servers, counterpart=counterpart)

    def _can_rehearse(self, card: Gpu, step: TrainingStep) -> bool:
        """Whether this system can rehearse a step on a card."""
        if card.name == f"{ANY_GPU} GPU":
            # Such a card has no real compute capability, so its kernels are not known.
            return False
        try:
            rehearsed_environment(card, environment=os.environ)
            if not isinstance(step.subject, str):
                packed(step)
        except (UnsupportedError, UsageError):
            return False
        return True


def _check_takes_ranks(card: Gpu, step: TrainingStep) -> None:
    """Refuse one rank of many on a card that cannot be rehearsed here.

    Raises:
        UsageError: The card is not NVIDIA's.
        UnsupportedError: This system cannot rehearse.
    """
    options = step.options
    assert options.parallel is not None
    try:
        rehearsed_environment(card, environment=os.environ)
    except (UnsupportedError, UsageError) as error:
        reason = str(error).partition(". ")[0].removesuffix(".")
        raise type(error)(
            f"{reason}. One rank of {options.world_size} ({options.parallel.value}) can only be "
            "rehearsed: leave parallel and world_size out, and the process alone is simulated."
        ) from error
