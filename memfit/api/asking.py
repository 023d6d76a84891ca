"""What a caller asks for: a step, a place and a search, checked and in one record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from typing_extensions import Unpack

from memfit.api.cards import Cards
from memfit.api.steps import (
    Subject,
    SubjectKeywords,
    cards_instead,
    default_gpus,
    describe,
    own_device,
    refuse_rank,
    taken,
)
from memfit.backends import Backend, open_backend
from memfit.cards import ANY_GPU, COMMON_GPUS, each_once, find_gpu
from memfit.errors import DoesNotFitError, UsageError
from memfit.planning import SearchOptions
from memfit.records import Engine, Parallel, Source
from memfit.rehearsal.engines import engine_for_several, engine_of, source_of
from memfit.step.training_step import TrainingStep
from memfit.units import parse_bytes

__all__ = ["Answer", "Asked", "SearchKeywords", "cards_named", "check_place"]

_Found = TypeVar("_Found")
_NO_GPU = (
    "There is no GPU here and none was named, so common cards were "
    "simulated. To measure on the CPU, give device='cpu' (--device cpu)."
)


class SearchKeywords(SubjectKeywords, total=False):
    """The options of every function that searches, by keyword, after those of the step.

    Args:
        memory: What the step may use: bytes, or text such as `"8GiB"`. It is the card's memory for
            a card that is not in this machine.
        engine: How a card that is not in this machine is tried: `"rehearse"`, `"simulate"`, or
            `"auto"` (the default).
        headroom: Share of the capacity that the recommendation keeps free; by default 0.05.
        multiple_of: The recommendation is a multiple of this; by default 1.
        max_batch_size: The largest batch size that is tried; by default 65,536.
    """

    memory: str | float | None
    engine: str | Engine
    headroom: float
    multiple_of: int
    max_batch_size: int | None


_SEARCH_ONLY = ("headroom", "multiple_of", "max_batch_size")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was found for one of several cards.

    Args:
        gpu: The card's name.
        found: The result; `None` if nothing fits.
        reason: The reason if nothing fits.
    """

    gpu: str
    found: Any
    reason: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A step, where to try it, and how to search.

    Args:
        step: The step; its precision may still be `AUTO`.
        search: The options of the search.
        memory_bytes: What the step may use, or the card's memory; `None` if it was not given.
        engine: How a card that is not in this machine is tried.
    """

    step: TrainingStep
    search: SearchOptions
    memory_bytes: int | None
    engine: str | Engine

    @classmethod
    def of(
        cls,
        subject: Subject,
        *,
        accumulate: bool = False,
        parallel: str | Parallel | None = None,
        world_size: int = 1,
        samples_per_step: int | None = None,
        **options: Unpack[SearchKeywords],
    ) -> Asked:
        """Check the options that a caller gave.

        Args:
            subject: A timm model's name, a workload, or a trainer's own object.
            accumulate: Run two micro-batches before each optimizer step instead of one.
            parallel: How the ranks share the model, if there are several.
            world_size: The number of ranks that train together.
            samples_per_step: Samples of one rank in an optimizer step, if that is planned.
            **options: The options of the step and of the search.

        Raises:
            UsageError: An option is not valid.
        """
        given: dict[str, Any] = dict(options)
        searched = {name: given.pop(name) for name in _SEARCH_ONLY if name in given}
        memory, engine = given.pop("memory", None), given.pop("engine", Engine.AUTO)
        made, step_options = taken(
            subject, cast("SubjectKeywords", given), samples_per_step=samples_per_step
        )
        return cls(
            step=describe(
                made,
                accumulate=accumulate,
                parallel=parallel,
                world_size=world_size,
                **step_options,
            ),
            search=SearchOptions(**searched),
            memory_bytes=None if memory is None else parse_bytes(memory),
            engine=engine,
        )

    @property
    def source_for_several(self) -> Source:
        """Where the figures of several cards come from."""
        return source_of(self._engine_for_several)

    @property
    def _engine_for_several(self) -> Engine:
        """How several cards are tried; one rank of many is always rehearsed."""
        chosen = engine_of(self.engine)
        if chosen is Engine.AUTO and self.step.options.parallel is not None:
            return Engine.REHEARSE
        return engine_for_several(chosen)

    def cards_instead(self, device: str | None, gpu: str | None) -> tuple[str, ...]:
        """Return the cards to try if the caller named no card and no device.

        Raises:
            UsageError: The caller named both, or a workload's model is on the wrong device.
        """
        check_place(device, gpu)
        return cards_instead(self.step.subject, device=device, gpu=gpu, memory=self.memory_bytes)

    def cards_named(self, gpus: Sequence[str] | None) -> tuple[str, ...]:
        """Return the cards that the caller named, or those to try by default."""
        return cards_named(gpus, self.memory_bytes)

    def on_one(
        self, ask: Callable[[Backend], _Found], *, device: str | None, gpu: str | None
    ) -> _Found:
        """Run a task on one device or card.

        Args:
            ask: The task; it closes the backend.
            device: The device that the caller named, if any.
            gpu: The card that is tried; `None` for a device of this machine.

        Raises:
            UsageError: There is no such device or card.
        """
        if gpu is not None:
            with Cards(engine_of(self.engine)) as cards:
                return ask(cards.open(gpu, self.memory_bytes, self.step))
        refuse_rank(self.step, "A device of this machine")
        return ask(
            open_backend(
                own_device(self.step.subject, device),
                memory_bytes=self.memory_bytes,
                headroom=self.search.headroom,
            )
        )

    def on_each(
        self,
        gpus: Sequence[str],
        ask: Callable[[Backend], Any],
        *,
        progress: Callable[[str, int, int], None] | None = None,
        is_quick: bool = False,
    ) -> list[Answer]:
        """Run the same task on several cards that are not in this machine; they share traces.

        Args:
            gpus: Names of the catalogue. All are looked up before the first card is tried.
            ask: The task that runs on each card; it closes the backend.
            progress: Called with the next card's name, the number of cards done, and of all cards.
            is_quick: Simulated cards do not ask the installed cuDNN for workspaces, which takes
                most of the time for a convolutional model on many cards.

        Raises:
            UsageError: There is no such card.
        """
        found = [find_gpu(name, total_bytes=self.memory_bytes) for name in gpus]
        answers = []
        with Cards(self._engine_for_several, is_quick=is_quick) as cards:
            for done, (name, card) in enumerate(zip(gpus, found, strict=True)):
                if progress is not None:
                    progress(card.name, done, len(gpus))
                opened = cards.open(name, self.memory_bytes, self.step)
                result, reason = None, None
                try:
                    result = ask(opened)
                except DoesNotFitError as error:
                    reason = str(error)
                answers.append(Answer(gpu=opened.device_name, found=result, reason=reason))
        return answers

    @staticmethod
    def remarks_on(gpus: Sequence[str]) -> tuple[str, ...]:
        """Return remarks for the case that no GPU was found and common cards were tried instead."""
        return (_NO_GPU,) if tuple(gpus) == default_gpus() else ()


def cards_named(gpus: Sequence[str] | None, memory_bytes: int | None) -> tuple[str, ...]:
    """Return the cards that a caller named, or those to try by default.

    Args:
        gpus: Names of the catalogue, if any were given.
        memory_bytes: What each card has, in place of the catalogue's figure.

    Raises:
        UsageError: There is no such card, or a single name was given and not a list.
    """
    if isinstance(gpus, str):
        raise UsageError(f"gpus takes a list of names: [{gpus!r}].")
    if gpus:
        return each_once(gpus, total_bytes=memory_bytes)
    return COMMON_GPUS if memory_bytes is None else (ANY_GPU,)


def check_place(device: str | None, gpu: str | None) -> None:
    """Refuse a device and a card at once.

    Raises:
        UsageError: Both were given.
    """
    if gpu is not None and device is not None:
        raise UsageError(f"Give a device ({device}) or a GPU to simulate ({gpu}), not both.")
