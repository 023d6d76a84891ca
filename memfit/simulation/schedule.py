"""What a traced step allocates and frees, for any batch size.

A `Schedule` is one stretch of a step. It was recorded at one batch size, and it knows how much each
allocation grows with every further sample. A `StepSchedule` is the whole step. This module does
not use torch.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from memfit.cards import Gpu
from memfit.errors import MemfitError
from memfit.records import Action, Event
from memfit.simulation.growth import grown, matches, with_growth_of
from memfit.simulation.needs import Need, NeedEvent
from memfit.simulation.program import Allocator, CardSizes, NeedNumbers, Player, Program
from memfit.simulation.tensor_lines import largest_within, tensor_lines

__all__ = [
    "BLAS_HANDLE",
    "BLAS_LT_HANDLE",
    "Schedule",
    "StepSchedule",
    "StreamsDifferError",
    "id_in_iteration",
    "traced_id",
]

BLAS_HANDLE: Final = "cuBLAS handle"
"""The origin of the workspace that a BLAS handle keeps."""

BLAS_LT_HANDLE: Final = "cuBLASLt handle"
"""The origin of the one that cuBLASLt keeps beside it, where it has its own."""

_KERNELS_RUN: Final = Event(action=Action.USER_DEFINED, id=0, num_bytes=0, origin="first kernel")
_EMPTY_CACHE: Final = Event(action=Action.EMPTY_CACHE, id=0, num_bytes=0)
_NUM_ITERATIONS = 3
# As in a measured trial: at most so many iterations (memfit.backends.readings).
_MAX_ITERATIONS = 6
_ALLOC, _FREE_COMPLETED = Action.ALLOC, Action.FREE_COMPLETED
# More than the allocations of any trace.
_IDS_OF_AN_ITERATION = 1 << 40
# A step that keeps more in every iteration is said to grow when it would double within so many.
_ITERATIONS_TO_DOUBLE = 1000


def id_in_iteration(number: int, iteration: int) -> int:
    """Return the id that an allocation has in one repetition of an iteration.

    Args:
        number: The id that it was traced with.
        iteration: Which repetition; 0 is the traced one.
    """
    return number + iteration * _IDS_OF_AN_ITERATION


def traced_id(number: int) -> int:
    """Return the id that an allocation was traced with; see `id_in_iteration`."""
    return number % _IDS_OF_AN_ITERATION


class StreamsDifferError(MemfitError):
    """Two batch sizes made different events, so other batch sizes cannot be derived from them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A stretch of events, affine in the batch size.

    Args:
        events: As recorded at `batch_size`.
        growth_bytes: For each event, how many bytes more it asks for with every further sample.
        batch_size: Samples that `events` was recorded with.
        outliving: Allocations that are still there when the stretch ends, by their ids. The number
            says how many repetitions later the stretch frees them; 0 for never.
        sizes: The sizes of what is a `Need`, on a card. They are there if any event is one.
    """

    events: tuple[Event, ...]
    growth_bytes: tuple[float, ...]
    batch_size: int
    outliving: Mapping[int, int] = dataclasses.field(default_factory=dict)
    sizes: CardSizes | None = dataclasses.field(default=None, repr=False, compare=False)
    _program: Program = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Keep the events in the form that a replay reads fastest."""
        program = Program(self.events, self.growth_bytes, self.batch_size)
        object.__setattr__(self, "_program", program)

    def on(self, sizes: CardSizes) -> Schedule:
        """Return this schedule with the sizes that a card decides."""
        if not self._program.different_needs:
            return self
        # A copy, because making the program anew would take longer than many replays.
        made = copy.copy(self)
        object.__setattr__(made, "sizes", sizes)
        return made

    @property
    def has_slow_needs(self) -> bool:
        """Whether the size of any event takes milliseconds to find."""
        return any(event.need.is_slow for event in self._program.different_needs)

    @classmethod
    def fixed(cls, events: Sequence[Event]) -> Schedule:
        """Return a schedule whose bytes do not depend on the batch size."""
        return cls(events=tuple(events), growth_bytes=(0,) * len(events), batch_size=1)

    @classmethod
    def between(
        cls, events: Sequence[Event], others: Sequence[Event], *, batch_sizes: tuple[int, int]
    ) -> Schedule:
        """Make a schedule from the same stretch at two batch sizes.

        Args:
            events: Its events at the first batch size; the schedule takes over their ids.
            others: Its events at the second.
            batch_sizes: The two; they differ.

        Raises:
            StreamsDifferError: The two do not match event by event.
        """
        if not matches(events, others):
            raise StreamsDifferError(
                f"The step allocates differently at the batch sizes {batch_sizes[0]} and "
                f"{batch_sizes[1]}."
            )
        samples = batch_sizes[1] - batch_sizes[0]
        pairs = [grown(*pair, samples) for pair in zip(events, others, strict=True)]
        return cls(
            events=tuple(event for event, _ in pairs),
            growth_bytes=tuple(growth for _, growth in pairs),
            batch_size=batch_sizes[0],
        )

    def seen_in(self, events: Sequence[Event], *, batch_size: int) -> Schedule:
        """Return this schedule in the events of the other recording that it was made from.

        Args:
            events: Its events there.
            batch_size: Samples that they were recorded with.
        """
        pairs = zip(self.events, events, strict=True)
        return Schedule(
            events=tuple(with_growth_of(event, other) for event, other in pairs),
            growth_bytes=self.growth_bytes,
            batch_size=batch_size,
        )

    def then(self, events: Sequence[Event]) -> Schedule:
        """Return this schedule followed by events that do not depend on the batch size."""
        return dataclasses.replace(
            self,
            events=self.events + tuple(events),
            growth_bytes=self.growth_bytes + (0,) * len(events),
        )

    @property
    def made(self) -> frozenset[int]:
        """The ids of its allocations."""
        return frozenset(event.id for event in self.events if event.action.is_request)

    def with_kept(self, kept: Sequence[tuple[int, Event]]) -> Schedule:
        """Return this schedule with allocations that nothing frees.

        Args:
            kept: Each after the allocation with this id.
        """
        if not kept:
            return self
        after: dict[int, list[Event]] = {}
        for number, event in kept:
            after.setdefault(number, []).append(event)
        events: list[Event] = []
        growth: list[float] = []
        for event, grows_by in zip(self.events, self.growth_bytes, strict=True):
            added = after.get(event.id, ()) if event.action.is_request else ()
            events += (event, *added)
            growth += (grows_by, *(0 for _ in added))
        return dataclasses.replace(self, events=tuple(events), growth_bytes=tuple(growth))

    def iteration(self, number: int) -> Schedule:
        """Return one repetition of the stretch, in which nothing takes an id that still lives.

        Args:
            number: Which one, from 0.
        """
        if not self.outliving:
            return self
        lags = self.outliving

        def named(event: Event) -> Event:
            lag = lags.get(event.id)
            if lag is None:
                return event
            then = number - lag if event.action is _FREE_COMPLETED else number
            return dataclasses.replace(event, id=id_in_iteration(event.id, then))

        return dataclasses.replace(self, events=tuple(map(named, self.events)), outliving={})

    def kept_bytes(self, batch_size: int) -> int:
        """Return the bytes that every repetition allocates and no repetition frees.

        Args:
            batch_size: Samples in each micro-batch.
        """
        lost = (
            event.num_bytes
            for event in self.at(batch_size)
            if event.action is _ALLOC and self.outliving.get(event.id) == 0
        )
        return sum(lost) if self.outliving else 0

    def without(self, origin: str) -> Schedule:
        """Return this schedule without the events of one origin."""
        kept = [
            (event, growth)
            for event, growth in zip(self.events, self.growth_bytes, strict=True)
            if event.origin != origin
        ]
        return dataclasses.replace(
            self, events=tuple(e for e, _ in kept), growth_bytes=tuple(g for _, g in kept)
        )

    def at(self, batch_size: int) -> Iterator[Event]:
        """Yield the events as they would be at a batch size."""
        for event, asked, _ in self._program.events_at(batch_size, self.sizes):
            if asked != event.num_bytes:
                yield dataclasses.replace(event, num_bytes=max(0, asked))
            else:
                yield event

    def watch(self, player: Player, batch_size: int) -> None:
        """Hand each event to a function, for example to record it.

        Args:
            player: Called with an event, the bytes that it asks for, and what a sample adds.
            batch_size: Samples in each micro-batch.
        """
        for event, asked, growth in self._program.events_at(batch_size, self.sizes):
            is_need = isinstance(event, NeedEvent) and any(event.growth)
            player(event, asked, asked / batch_size if is_need else growth)

    def play(
        self, allocator: Allocator, batch_size: int, *, plans: dict[Need, int] | None = None
    ) -> None:
        """Replay the events on an allocator.

        Args:
            allocator: The allocator.
            batch_size: Samples in each micro-batch.
            plans: What is asked for in place of what found no room before. It is kept up to date.
        """
        plans = {} if plans is None else plans
        self._program.play(allocator, batch_size, sizes=self.sizes, plans=plans)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepSchedule:
    """A training step from its start.

    Args:
        setup: The allocations that exist before the first iteration: parameters, buffers,
            workspaces.
        first: The first iteration, in which the optimizer's state appears.
        later: Every further one.
    """

    setup: Schedule
    first: Schedule
    later: Schedule
    _lines: dict[float, float] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _numbers: NeedNumbers = dataclasses.field(
        default_factory=NeedNumbers, init=False, repr=False, compare=False
    )

    def on(self, gpu: Gpu, *, is_rough: bool = False) -> StepSchedule:
        """Return this step with the sizes that a card decides.

        Args:
            gpu: The card.
            is_rough: See `CardSizes`.
        """
        sizes = CardSizes(gpu, self._numbers, is_rough=is_rough)
        parts = (self.setup, self.first, self.later)
        setup, first, later = (part.on(sizes) for part in parts)
        if setup is self.setup and first is self.first and later is self.later:
            return self
        return dataclasses.replace(self, setup=setup, first=first, later=later)

    def as_run(self, kept: Sequence[tuple[int, Event]]) -> StepSchedule:
        """Return this step as a trial runs it in a process whose first work on the card it is.

        The first kernels run when the model is there. A trial begins with an empty cache, so that
        what was freed while the model was made, as by a move to channels-last, counts in none.

        Args:
            kept: What libraries keep from their first call on, each after the allocation with this
                id. If that is in no event of the setup or of the first iteration, because the step
                settles later, the library has it from the start.
        """
        in_setup, in_first = (part.made for part in (self.setup, self.first))
        setup = self.setup.with_kept([pair for pair in kept if pair[0] in in_setup])
        before = [event for number, event in kept if number not in in_setup | in_first]
        return dataclasses.replace(
            self,
            setup=setup.then([_EMPTY_CACHE, _KERNELS_RUN, *before]),
            first=self.first.with_kept([pair for pair in kept if pair[0] in in_first - in_setup]),
        )

    @property
    def has_slow_needs(self) -> bool:
        """Whether the size of any event takes milliseconds to find."""
        return self.later.has_slow_needs

    def at(self, batch_size: int, *, num_iterations: int = _NUM_ITERATIONS) -> Iterator[Event]:
        """Yield all events of a training run's beginning.

        Args:
            batch_size: Samples in each micro-batch.
            num_iterations: Optimizer steps, at least 1.
        """
        for schedule in self._stretches(num_iterations):
            yield from schedule.at(batch_size)

    def play(self, allocator: Allocator, batch_size: int) -> Iterator[int]:
        """Replay on an allocator until the peak has settled.

        Args:
            allocator: A new one.
            batch_size: Samples in each micro-batch.

        Yields:
            The peak of reserved bytes after each iteration.

        Raises:
            AllocatorOutOfMemoryError: The step does not fit.
        """
        plans: dict[Need, int] = {}
        for schedule in self.until_settled(allocator):
            schedule.play(allocator, batch_size, plans=plans)
            if schedule is not self.setup:
                yield allocator.stats.peak_reserved_bytes

    def until_settled(self, allocator: Allocator) -> Iterator[Schedule]:
        """Yield the stretches to replay, one after another, until the peak has settled.

        The optimizer's state belongs to the peak from the second iteration on. A later iteration
        can still take more, because fragments move. An iteration that asks nothing of the device
        leaves the allocator as it was, so every further one would be the same, and the replay ends.
        If each iteration asks for something, it ends when two peaks agree. A step that keeps more
        in every iteration never settles. It is replayed as often as a trial would run it.

        Args:
            allocator: Where each is replayed before the next is taken.
        """
        yield self.setup
        yield self.first
        is_growing = 0 in self.later.outliving.values()
        peaks = [allocator.stats.peak_reserved_bytes]
        while len(peaks) < _MAX_ITERATIONS:
            num_calls = allocator.num_device_calls
            yield self.later.iteration(len(peaks))
            peaks.append(allocator.stats.peak_reserved_bytes)
            if is_growing:
                continue
            if allocator.num_device_calls == num_calls:
                break
            if len(peaks) >= _NUM_ITERATIONS and peaks[-1] == peaks[-2]:
                break

    def grows(self, batch_size: int, peak_bytes: int) -> bool:
        """Whether every iteration keeps so much more memory that training must run out of it.

        Args:
            batch_size: Samples in each micro-batch.
            peak_bytes: The bytes that the step takes so far.
        """
        return self.later.kept_bytes(batch_size) * _ITERATIONS_TO_DOUBLE > peak_bytes

    @property
    def heaviest(self) -> tuple[float, float]:
        """What a sample adds at most to what tensors hold, and what they hold without one."""
        return max(self._tensor_lines().items())

    def largest_within(self, num_bytes: int) -> int | None:
        """Return a batch size beyond which the step's tensors alone need more than the memory.

        Args:
            num_bytes: The bytes of the memory.

        Returns:
            The batch size, possibly 0; `None` if tensors do not grow with the batch size.
        """
        return largest_within(self._tensor_lines(), num_bytes)

    def _tensor_lines(self) -> dict[float, float]:
        if not self._lines:  # They are the same for every card.
            self._lines.update(
                tensor_lines(
                    (schedule.events, schedule.growth_bytes, schedule.batch_size)
                    for schedule in self._stretches(2)
                )
            )
        return self._lines

    def _stretches(self, num_iterations: int) -> tuple[Schedule, ...]:
        later = (self.later.iteration(number) for number in range(1, num_iterations))
        return (self.setup, self.first, *later)
