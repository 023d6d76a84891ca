"""timm's loop over batch sizes, simulated with what a failed attempt leaves behind.

timm's benchmark makes the model anew for each attempt, and gives the cache back before. At that
moment the failed attempt's model and images are still there, and the gradients and the state that
it had got to. They are freed when the next model has been made, and the next images take the place
of the last ones, in a segment that is larger than they are. So a batch size is tried in other room
than a first attempt has. Where BLAS keeps its workspaces in the allocator (torch 1.13 to 2.14),
those of the failed attempt stay too, in the middle of a large segment that they keep from being
given back. (Each model had a process of its own: with workspaces made before the first attempt,
fewer rows of torch 2.9 are exact.)

Source: `BenchmarkRunner` and `_try_run` in timm's benchmark.py (0.6.6, 1.0.9 and 1.0.24),
`decay_batch_step`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from memfit.records import Action, Event
from memfit.simulation.allocator.blocks import BlockOrder
from memfit.simulation.allocator.caching import AllocatorOutOfMemoryError
from memfit.simulation.allocator.compiled import CompiledAllocator, new_allocator
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.simulation.needs import Need
from memfit.simulation.schedule import BLAS_HANDLE, BLAS_LT_HANDLE, Schedule, StepSchedule

__all__ = ["CHANNELS", "Images", "made_once", "simulated_rung"]

CHANNELS = 3
_FLOAT_BYTES = 4
_HANDLES = (BLAS_HANDLE, BLAS_LT_HANDLE)
_MADE_BY = ("aten.randn.default", "aten.randint.default")
_LAID_OUT_BY = "aten.clone.default"
# More than the ids of any schedule. Attempts alternate between two ranges of ids.
_IDS_OF_AN_ATTEMPT = 1 << 52
_EMPTY_CACHE = Schedule.fixed([Event(action=Action.EMPTY_CACHE, id=0, num_bytes=0)])


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a run: pixels of a side, and whether they are made channels-last."""

    size: int
    is_last: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of one image in float32."""
        return CHANNELS * self.size**2 * _FLOAT_BYTES


def simulated_rung(
    schedule: StepSchedule,
    rungs: Sequence[int],
    *,
    capacity_bytes: int,
    images: Images | None = None,
    most_samples: int | None = None,
) -> int:
    """Return the first batch size of a ladder that fits, or 0.

    Args:
        schedule: The step on a card.
        rungs: The batch sizes, in the order of the attempts.
        capacity_bytes: What the allocator can take of the card.
        images: The images, if the setup of the schedule ends with them; `None` if the first
            iteration makes them.
        most_samples: An operator refuses more.
    """
    allocator = new_allocator(
        capacity_bytes=capacity_bytes,
        settings=AllocatorSettings(block_order=BlockOrder.ADDRESS),
    )
    assert isinstance(allocator, CompiledAllocator), "it needs a C compiler"
    attempt = _Attempt.of(schedule, images)
    turns = attempt, attempt.moved()
    left: set[int] = set()
    for number, batch_size in enumerate(rungs):
        attempt = turns[number % 2]
        try:
            _EMPTY_CACHE.play(allocator, batch_size)
            attempt.model.play(allocator, batch_size)
        except AllocatorOutOfMemoryError:
            # The attempt before stays, so no further model finds room.
            return 0
        _freeing(left).play(allocator, batch_size)
        refuses = most_samples is not None and batch_size > most_samples
        ending = _run(allocator, attempt, batch_size, refuses=refuses)
        if ending.fits:
            return batch_size
        left = ending.left
        turns = turns[0].without(ending.handles), turns[1].without(ending.handles)
    return 0


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """An attempt: the model, and a step whose setup makes the images."""

    model: Schedule
    step: StepSchedule

    @classmethod
    def of(cls, schedule: StepSchedule, images: Images | None) -> _Attempt:
        """Cut a schedule in two."""
        model, made = schedule.setup, Schedule.fixed(())
        if images is not None:
            model, made = _cut(model)
            if images.is_last:
                made = _copied(made, images)
        return cls(model, dataclasses.replace(schedule, setup=made))

    def moved(self) -> _Attempt:
        """Return the attempt with other ids."""
        step = self.step
        setup, first, later = map(_moved, (step.setup, step.first, step.later))
        return _Attempt(
            _moved(self.model), dataclasses.replace(step, setup=setup, first=first, later=later)
        )

    def without(self, origins: Iterable[str]) -> _Attempt:
        """Return the attempt without what the process has by now."""
        first = self.step.first
        for origin in origins:
            first = first.without(origin)
        return dataclasses.replace(self, step=dataclasses.replace(self.step, first=first))

    def stretches(self, allocator: CompiledAllocator, *, refuses: bool) -> Iterator[Schedule]:
        """Yield what is run once the model is there, until the peak has settled."""
        if refuses:
            yield self.step.setup
        else:
            yield from self.step.until_settled(allocator)


@dataclasses.dataclass(frozen=True)
class _Ending:
    """How an attempt ended: what is left of it, and the BLAS handles that the process has since."""

    fits: bool
    left: set[int] = dataclasses.field(default_factory=set)
    handles: tuple[str, ...] = ()


def _run(
    allocator: CompiledAllocator, attempt: _Attempt, batch_size: int, *, refuses: bool
) -> _Ending:
    plans: dict[Need, int] = {}
    left = _survivors(attempt.model)
    made_bytes = allocator.stats.requested_bytes
    stretch = attempt.model
    try:
        for stretch in attempt.stretches(allocator, refuses=refuses):
            left |= _survivors(stretch)
            if stretch is attempt.step.first:
                made_bytes = allocator.stats.requested_bytes
            stretch.play(allocator, batch_size, plans=plans)
    except AllocatorOutOfMemoryError:
        _freeing(stretch.made - left).play(allocator, batch_size)
    else:
        if not refuses:
            return _Ending(fits=True)
    kept_bytes = allocator.stats.requested_bytes - made_bytes
    handles = []
    for event in attempt.step.first.at(batch_size):
        if kept_bytes > 0 and event.action.is_request and event.id in left:
            kept_bytes -= event.num_bytes
            if event.origin in _HANDLES:
                handles.append(event.origin)
                left.remove(event.id)
    return _Ending(fits=False, left=left, handles=tuple(handles))


def _survivors(stretch: Schedule) -> set[int]:
    """Return what a stretch makes and does not free."""
    freed = {event.id for event in stretch.events if event.action is Action.FREE_COMPLETED}
    return set(stretch.made - freed)


def _cut(setup: Schedule) -> tuple[Schedule, Schedule]:
    """Return the events of the model, and that of the images. Classes are not made."""
    at = next(at for at, growth in enumerate(setup.growth_bytes) if growth)
    return tuple(
        dataclasses.replace(setup, events=setup.events[part], growth_bytes=setup.growth_bytes[part])
        for part in (slice(at), slice(at, at + 1))
    )  # type: ignore[return-value]


def _copied(made: Schedule, images: Images) -> Schedule:
    """Return the making of images that randn makes in NCHW. A copy replaces them."""
    number, num_bytes = _IDS_OF_AN_ATTEMPT - 1, images.num_bytes
    randn = Event(action=Action.ALLOC, id=number, num_bytes=num_bytes * made.batch_size)
    free = Event(action=Action.FREE_COMPLETED, id=number, num_bytes=0)
    return dataclasses.replace(
        made,
        events=(randn, *made.events, free),
        growth_bytes=(num_bytes, *made.growth_bytes, 0),
    )


def _moved(stretch: Schedule) -> Schedule:
    events = tuple(
        dataclasses.replace(event, id=event.id + _IDS_OF_AN_ATTEMPT) for event in stretch.events
    )
    outliving = {number + _IDS_OF_AN_ATTEMPT: lag for number, lag in stretch.outliving.items()}
    return dataclasses.replace(stretch, events=events, outliving=outliving)


def _freeing(ids: Iterable[int]) -> Schedule:
    """Return a stretch that frees what is there of some allocations."""
    return Schedule.fixed(
        [Event(action=Action.FREE_COMPLETED, id=number, num_bytes=0) for number in sorted(ids)]
    )


def made_once(schedule: StepSchedule, *, is_last: bool) -> StepSchedule:
    """Return a step in which the images are there from the start.

    A step of memfit's makes a batch for each iteration, as a loader does. Then the blocks of the
    inputs are cut from others, and other blocks from theirs. It also lays the images out in NHWC in
    each iteration, where timm's benchmark has made them so.

    Args:
        schedule: The step. The setup of the result ends with its images, and classes if it has any.
        is_last: Whether it lays the images out in NHWC.
    """
    first, inputs = _without_inputs(schedule.first, is_last=is_last)
    later, _ = _without_inputs(schedule.later, is_last=is_last)
    setup = schedule.setup
    events, growth = list(setup.events), list(setup.growth_bytes)
    for event, grows_by in inputs:
        at_setup = event.num_bytes + grows_by * (setup.batch_size - schedule.first.batch_size)
        events.append(dataclasses.replace(event, num_bytes=int(at_setup)))
        growth.append(grows_by)
    longer = dataclasses.replace(setup, events=tuple(events), growth_bytes=tuple(growth))
    return dataclasses.replace(schedule, setup=longer, first=first, later=later)


def _without_inputs(
    stretch: Schedule, *, is_last: bool
) -> tuple[Schedule, list[tuple[Event, float]]]:
    pairs = list(zip(stretch.events, stretch.growth_bytes, strict=True))
    made = [
        (event, growth)
        for event, growth in pairs[: len(_MADE_BY)]
        if event.action is Action.ALLOC and event.origin in _MADE_BY
    ]
    ids = {event.id for event, _ in made}
    if is_last:
        laid_out = stretch.events[len(made)]
        assert laid_out.origin == _LAID_OUT_BY, laid_out
        ids.add(laid_out.id)
    kept = [(event, growth) for event, growth in pairs if event.id not in ids]
    shorter = dataclasses.replace(
        stretch,
        events=tuple(event for event, _ in kept),
        growth_bytes=tuple(growth for _, growth in kept),
    )
    return shorter, made
