"""timm's loop over batch sizes, with what a failed attempt leaves behind.

timm's benchmark makes the model anew for each attempt, and gives the cache back before. At that
moment the failed attempt's model and images are still there. They are freed when the next model has
been made, and the next images take the place of the last ones, in a segment that is larger than
they are. So a batch size is tried in less room than a first attempt has. Where BLAS keeps its
workspaces (torch 2.14 and older), those of the failed attempt stay too, in the middle of a large
segment that they keep from being given back. (Each model had a process of its own: with workspaces
made before the first attempt, fewer rows are exact.)

With `--torchcompile`, each attempt forgets what was compiled (`torch._dynamo.reset`) once its own
model is made, and compiles for its own batch size: Inductor, with every option at its default.

Source: `BenchmarkRunner` and `_try_run` in timm's benchmark.py (1.0.9 and 1.0.24),
`decay_batch_step`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import signal
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from inference_loops import InHalf

from memfit.records import Action
from memfit.simulation.allocator.blocks import BlockOrder
from memfit.simulation.allocator.caching import AllocatorOutOfMemoryError
from memfit.simulation.allocator.compiled import CompiledAllocator, EventTable, new_allocator
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.simulation.schedule import BLAS_HANDLE, BLAS_LT_HANDLE, Schedule, StepSchedule
from memfit.step.compiling import CompiledModel
from memfit.step.training_step import TrainingStep
from memfit.step.unfilled import UnfilledWeights

__all__ = ["Attempt", "Images", "Walk", "rehearsed_rung", "simulated_rung"]

_NUM_ITERATIONS = 4
_HANDLES = (BLAS_HANDLE, BLAS_LT_HANDLE)
_FLOAT_BYTES = 4
# More than the ids of any schedule. Attempts alternate between two ranges of ids.
_IDS_OF_AN_ATTEMPT = 1 << 52
_CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a run: pixels of a side, and whether they are made channels-last."""

    size: int
    is_last: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of one image in float32."""
        return _CHANNELS * self.size**2 * _FLOAT_BYTES


def simulated_rung(
    schedule: StepSchedule,
    rungs: Sequence[int],
    images: Images,
    *,
    capacity_bytes: int,
    most_samples: int | None,
) -> int:
    """Return the first batch size of a ladder that fits, or 0.

    Args:
        schedule: The step on a card; its setup ends with the inputs.
        rungs: The batch sizes, in the order of the attempts.
        images: The images.
        capacity_bytes: What the allocator can take of the card.
        most_samples: An operator refuses more.
    """
    allocator = new_allocator(
        capacity_bytes=capacity_bytes,
        settings=AllocatorSettings(block_order=BlockOrder.ADDRESS),
    )
    assert isinstance(allocator, CompiledAllocator), "it needs a C compiler"
    model, inputs = _cut(schedule.setup)
    first = schedule.first
    held: list[int] = []
    for number, batch_size in enumerate(rungs):
        own_ids = _IDS_OF_AN_ATTEMPT * (number % 2)
        model, inputs = _moved(model, own_ids), _moved(inputs, own_ids)
        _play(allocator, [(Action.EMPTY_CACHE, 0)])
        made_bytes = None
        try:
            model.play(allocator, batch_size)
            _free(allocator, held)
            held = _ids(model)
            if images.is_last:
                # randn makes them in NCHW, and the copy replaces them.
                made = own_ids + _IDS_OF_AN_ATTEMPT - 1
                allocator.allocate(made, images.num_bytes * batch_size)
                inputs.play(allocator, batch_size)
                _free(allocator, [made])
            else:
                inputs.play(allocator, batch_size)
            held += _ids(inputs)
            made_bytes = allocator.stats.requested_bytes
            if most_samples is None or batch_size <= most_samples:
                _iterate(allocator, first, schedule.later, batch_size)
                return batch_size
        except AllocatorOutOfMemoryError:
            held = _ids(model) + _ids(inputs)
            made = own_ids + _IDS_OF_AN_ATTEMPT - 1
            handles = [event for event in first.at(batch_size) if event.origin in _HANDLES]
            passing = {made, *_ids(first), *_ids(schedule.later)}
            _free(allocator, passing.difference(event.id for event in handles))
            if made_bytes is not None:
                kept_bytes = allocator.stats.requested_bytes - made_bytes
                for event in handles:
                    if kept_bytes > 0:
                        kept_bytes -= event.num_bytes
                        first = first.without(event.origin)
    return 0


def _iterate(
    allocator: CompiledAllocator, first: Schedule, later: Schedule, batch_size: int
) -> None:
    plans: dict[Any, int] = {}
    first.play(allocator, batch_size, plans=plans)
    for number in range(1, _NUM_ITERATIONS):
        num_calls = allocator.num_device_calls
        later.iteration(number).play(allocator, batch_size, plans=plans)
        if allocator.num_device_calls == num_calls:
            return


def _cut(setup: Schedule) -> tuple[Schedule, Schedule]:
    """Return the events of the model, and those of the images. Classes are not made."""
    at = next(at for at, growth in enumerate(setup.growth_bytes) if growth)
    return tuple(
        dataclasses.replace(setup, events=setup.events[part], growth_bytes=setup.growth_bytes[part])
        for part in (slice(at), slice(at, at + 1))
    )  # type: ignore[return-value]


def _moved(schedule: Schedule, own_ids: int) -> Schedule:
    events = tuple(
        dataclasses.replace(event, id=event.id % _IDS_OF_AN_ATTEMPT + own_ids)
        for event in schedule.events
    )
    return dataclasses.replace(schedule, events=events)


def _ids(schedule: Schedule) -> list[int]:
    return [event.id for event in schedule.events]


def _free(allocator: CompiledAllocator, ids: Iterable[int]) -> None:
    _play(allocator, [(Action.FREE_COMPLETED, number) for number in ids])


def _play(allocator: CompiledAllocator, actions: list[tuple[Action, int]]) -> None:
    table = EventTable([(action, number, 0, 0) for action, number in actions], {})
    allocator.play(table, 0, sizes=array("q", [0]), plans=array("q", [0]))


@dataclasses.dataclass(frozen=True)
class Walk:
    """Which part of a ladder is walked.

    The first attempt is at `start`, in an empty process. While nothing has failed, the next one is
    a rung higher. After a failure, they go down as timm's loop does, in what the failed ones left
    behind. So from the rung above the edge, two attempts decide as the whole ladder does.

    Args:
        rungs: The batch sizes, in the order of timm's loop.
        start: Where in it the first attempt is.
        most_attempts: The walk ends after so many; `None` for no limit.
        most_seconds: It ends after so long on a core, in the middle of an attempt; `None` for no
            limit. What else the machine does is not counted.
    """

    rungs: Sequence[int]
    start: int = 0
    most_attempts: int | None = None
    most_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Attempt:
    """How an attempt ended.

    Args:
        batch_size: The batch size.
        peak_reserved_bytes: The most that was reserved, with what the attempt before left.
        error: Why it failed; `None` if it fits.
        seconds: How long it took on a core, here.
    """

    batch_size: int
    peak_reserved_bytes: int
    error: str | None
    seconds: float


class _Bench:
    """One batch size: a new model on the card, and then its images and forward passes."""

    def __init__(self, step: TrainingStep, batch_size: int) -> None:
        # The card computes nothing, so the weights can be anything.
        with UnfilledWeights():
            prepared = step.prepare(torch.device("cuda"))
        prepared.begin()
        self._model = prepared.model
        if step.options.compile:
            self._model = CompiledModel(prepared.model).module
        self._batch_size = batch_size
        self._no_grad = step.options.no_grad

    def run(self, images: Images, most_samples: int | None) -> None:
        """Run a few forward passes, as timm's `InferenceBenchmarkRunner.run` does."""
        with torch.no_grad() if self._no_grad else torch.inference_mode():
            shape = self._batch_size, _CHANNELS, images.size, images.size
            made = torch.randn(shape, device="cuda")
            if images.is_last:
                made = made.contiguous(memory_format=torch.channels_last)
            self._images = made
            if most_samples is not None and self._batch_size > most_samples:
                raise RuntimeError("an operator refuses so many samples")
            for _ in range(_NUM_ITERATIONS):
                with torch.autocast("cuda", torch.float16):
                    self._model(self._images)


def rehearsed_rung(
    _backend: Any,
    step: TrainingStep,
    walk: Walk,
    images: Images,
    most: int | None,
    in_half: InHalf,
) -> tuple[int | None, tuple[Attempt, ...]]:
    """Return the batch size at which timm's loop ends on this process's card, and the attempts.

    It is 0 if the smallest one fails, and `None` if the walk ended before the edge was found.
    """
    in_half.set()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    attempts: list[Attempt] = []
    at = walk.start
    with _limited(walk.most_seconds):
        while at < len(walk.rungs) and len(attempts) != walk.most_attempts:
            start = time.process_time()
            error = None
            try:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                bench = _Bench(step, walk.rungs[at])
                bench.run(images, most)
            except RuntimeError as refusal:
                error = str(refusal)[:300]
            peak = torch.cuda.memory_stats()["reserved_bytes.all.peak"]
            attempts.append(
                Attempt(walk.rungs[at], peak, error, round(time.process_time() - start, 1))
            )
            if error is not None:
                at += 1
                continue
            has_failed = any(attempt.error is not None for attempt in attempts)
            if at == 0 or has_failed:
                return walk.rungs[at], tuple(attempts)
            at -= 1
            # timm's loop was not here before the rung above: nothing is left behind.
            del bench
            torch.compiler.reset()
            gc.collect()
    return (0 if at == len(walk.rungs) else None), tuple(attempts)


class _OutOfTime(BaseException):
    """Not an Exception, because the compiler makes its own error of each of those."""


@contextlib.contextmanager
def _limited(seconds: float | None) -> Iterator[None]:
    """Leave the block after so many seconds on a core."""

    def give_up(*_: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGPROF, give_up)
    # Again and again, because an exception in a callback of C code can get lost.
    signal.setitimer(signal.ITIMER_PROF, seconds or 0, 5)
    try:
        yield
    except _OutOfTime:
        pass
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
