"""One search on one backend; the backend's prediction, if any, is the hint."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch

from memfit import search
from memfit.backends import Backend, Prediction, with_precision
from memfit.errors import DataEndedError, DoesNotFitError, UsageError
from memfit.memory import oom
from memfit.memory.restore import save_random_states
from memfit.records import ProbeResult, Source, Trial
from memfit.step.made_batches import bytes_of
from memfit.step.training_step import TrainingStep
from memfit.step.workload import Workload
from memfit.units import MIB, format_bytes, parse_count

_QUICK_BYTES = 16 * MIB

__all__ = ["SearchOptions", "probe_on", "run_search", "run_trial"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """The options of a search.

    Args:
        headroom: Share of the capacity that the recommendation keeps free, from 0 to below 1.
        multiple_of: The recommendation is a multiple of this, at least 1.
        max_batch_size: The largest batch size to try; `None` for the search's own limit.

    Raises:
        UsageError: A value is out of its range.
    """

    headroom: float = 0.05
    multiple_of: int = 1
    max_batch_size: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that are out of range, and make integers of numbers such as NumPy's."""
        search.checked_headroom(self.headroom)
        most = self.max_batch_size
        most = None if most is None else parse_count("max_batch_size", most)
        object.__setattr__(self, "max_batch_size", most)
        object.__setattr__(self, "multiple_of", parse_count("multiple_of", self.multiple_of))


def probe_on(
    opened: Backend,
    step: TrainingStep,
    options: SearchOptions,
    *,
    progress: Callable[[Trial], None] | None = None,
) -> ProbeResult:
    """Search on a backend, and close it.

    Args:
        opened: The backend that runs trials.
        step: The step to train; its precision may still be `AUTO`.
        options: The options of the search.
        progress: Called with each trial when it has ended.

    Raises:
        DoesNotFitError: Not even the smallest batch fits.
    """
    with opened as backend:
        return run_search(backend, step, options, progress=progress)


def run_search(
    backend: Backend,
    step: TrainingStep,
    options: SearchOptions,
    *,
    progress: Callable[[Trial], None] | None = None,
) -> ProbeResult:
    """Search as `probe_on` does, on a backend that is already open, and leave it open."""
    start = time.perf_counter()
    step = with_precision(step, backend)
    trials: list[Trial] = []
    remarks: tuple[str, ...] = ()

    def trial(batch_size: int) -> Trial:
        earlier = next((t for t in trials if remarks and t.batch_size == batch_size), None)
        if earlier is not None:
            return earlier
        trials.append(_tried(backend, step, batch_size, is_first=not trials))
        if progress is not None:
            progress(trials[-1])
        return trials[-1]

    # A card's process may still be starting. The simulation does not need it.
    prediction = backend.prediction(step)
    capacity = backend.capacity()
    # The batch size that will be recommended is tried first. If the prediction is right, only this
    # one and the sizes that prove the edge have to be tried.
    expected = _expected_recommendation(prediction, capacity.safe_bytes, options)
    ceiling = options.max_batch_size or search.DEFAULT_CEILING
    while True:
        try:
            is_near = expected is not None and expected <= ceiling
            first = (
                _first_trials(trial, prediction, expected, capacity.safe_bytes, options)
                if is_near and expected is not None
                else ()
            )
            found = search.find_largest(
                trial,
                capacity_bytes=capacity.usable_bytes,
                hint=None if remarks else prediction.batch_size,
                known=first,
                ceiling=ceiling,
                has_retries=backend.has_retries,
            )
            if trials[-1].source is Source.SIMULATED and found.batch_size is not None:
                _check_data(step, found.batch_size)
            break
        except (DataEndedError, _SizeLimitError) as end:
            ceiling, remark = _ceiling_at(end, trial, trials, ceiling)
            remarks = (remark,)
    if found.batch_size is None:
        raise _does_not_fit(step, backend, found)
    recommended = search.recommended(
        trial,
        found,
        capacity_bytes=capacity.safe_bytes,
        headroom=options.headroom,
        multiple_of=options.multiple_of,
        has_retries=backend.has_retries,
        accepts_close=bool(first),
    )
    best = _improved(
        trial,
        prediction,
        recommended.batch_size,
        trials,
        capacity_bytes=capacity.safe_bytes,
        options=options,
    )
    return ProbeResult(
        subject=step.name,
        device=backend.device_name,
        source=trials[-1].source,
        options=step.options,
        capacity=capacity,
        max_batch_size=found.batch_size,
        recommended_batch_size=best,
        edge_found=found.proved,
        headroom=options.headroom,
        multiple_of=options.multiple_of,
        trials=tuple(trials),
        environment=backend.environment,
        seconds=time.perf_counter() - start,
        torch_version=torch.__version__,
        predictions=prediction.trials_of(tuple(trial.batch_size for trial in trials)),
        remarks=remarks,
    )


class _SizeLimitError(Exception):
    """An operator did not take so many samples, and raised `error`."""

    def __init__(self, batch_size: int, error: Exception) -> None:
        super().__init__(batch_size)
        self.batch_size = batch_size
        # The traceback holds the tensors of the step that failed, and more trials follow.
        self.error = error.with_traceback(None)


def _tried(backend: Backend, step: TrainingStep, batch_size: int, *, is_first: bool) -> Trial:
    try:
        return run_trial(backend, step, batch_size, is_first=is_first)
    except Exception as error:
        if not oom.is_size_limit(error):
            raise
        limit = _SizeLimitError(batch_size, error)
    raise limit


def _ceiling_at(
    end: DataEndedError | _SizeLimitError,
    trial: Callable[[int], Trial],
    trials: Sequence[Trial],
    ceiling: int,
) -> tuple[int, str]:
    """Return the batch size that the search ends at instead, and a remark that says why.

    Args:
        end: What a batch size met.
        trial: Tries a batch size.
        trials: The trials until then.
        ceiling: Where the search would have ended.

    Raises:
        DataEndedError: No smaller batch size is known to have data.
        Exception: An operator's own error, if it refuses one sample as well.
    """
    low = max((trial.batch_size for trial in trials if trial.fits), default=0)
    if isinstance(end, _SizeLimitError):
        return _largest_taken(trial, low, end)
    num_samples = end.num_samples or low
    if not 0 < num_samples < ceiling:
        raise end
    return num_samples, _data_ends(num_samples)


def _largest_taken(
    trial: Callable[[int], Trial], low: int, limit: _SizeLimitError
) -> tuple[int, str]:
    """Return the batch size below the first one that an operator refuses, and a remark.

    If memory runs out before, the batch size that is returned is an upper bound.
    """
    while limit.batch_size - low > 1:
        middle = (low + limit.batch_size) // 2
        try:
            if not trial(middle).fits:
                break
        except _SizeLimitError as smaller:
            limit = smaller
        else:
            low = middle
    if limit.batch_size == 1:
        raise limit.error
    return limit.batch_size - 1, (
        f"Batch size {limit.batch_size} fails however much memory is free, because "
        f"an operator does not take so many samples ({oom.first_line(limit.error)}). "
        "Larger batches were not tried."
    )


def _data_ends(num_samples: int) -> str:
    return (
        f"The data ends at {num_samples} samples, so larger batches were not "
        f"tried. If that is intended, give max_batch_size={num_samples}. If "
        "not, give a function that repeats the samples."
    )


def _check_data(step: TrainingStep, batch_size: int) -> None:
    """Ask a user's function for a batch of the simulated size, or as large as can be had quickly.

    A trace asks for a few samples only, so it would not reach the end of a small data set.

    Raises:
        DataEndedError: The data set has fewer samples.
    """
    subject = step.subject
    if not isinstance(subject, Workload) or subject.example_batch_size is not None:
        return
    restore = save_random_states()
    try:
        sample_bytes = max(bytes_of(subject.batch_of(1)), 1)
        subject.batch_of(max(1, min(batch_size, _QUICK_BYTES // sample_bytes)))
    finally:
        restore()


def _first_trials(
    trial: Callable[[int], Trial],
    prediction: Prediction,
    expected: int,
    capacity_bytes: int,
    options: SearchOptions,
) -> tuple[Trial, ...]:
    """Try what is expected to be recommended, and once more where the prediction was too low.

    The second batch size is the one that would be recommended if every prediction were wrong by the
    same factor as the first. With allocator retries, the factor is at least what the trial shows.
    """
    first = trial(expected)
    simulated, step = prediction.simulated, prediction.step
    limit_bytes = search.limit_of(capacity_bytes, options.headroom)
    if search.has_headroom(first, limit_bytes) or simulated is None or step is None:
        return (first,)
    seen = first.peak_reserved_bytes or 0
    if first.num_alloc_retries or not first.fits:
        # It needs more than there is, wherever its peak was when the cache was given back.
        seen = capacity_bytes
    guessed = simulated.trial(step, expected).peak_reserved_bytes or seen
    if guessed >= seen:
        return (first,)
    scaled_bytes = capacity_bytes * guessed // seen
    second = _expected_recommendation(prediction, scaled_bytes, options)
    if second is None or second >= expected:
        return (first,)
    return (first, trial(second))


def _expected_recommendation(
    prediction: Prediction, capacity_bytes: int, options: SearchOptions
) -> int | None:
    """Return the batch size that the simulation of a device recommends, if any.

    The rough simulation looks around. What it finds good is looked at exactly before a device tries
    it.
    """
    edge, scout, step = prediction.batch_size, prediction.scout, prediction.step
    if edge is None or scout is None or step is None:
        return None
    exact, limit_bytes = prediction.simulated, search.limit_of(capacity_bytes, options.headroom)

    def look(size: int) -> Trial:
        seen = scout.trial(step, size)
        if exact is None or not search.has_headroom(seen, limit_bytes):
            return seen
        return exact.trial(step, size)

    return search.foreseen(
        look,
        scout.trial(step, min(edge, options.max_batch_size or search.DEFAULT_CEILING)),
        capacity_bytes=capacity_bytes,
        headroom=options.headroom,
        multiple_of=options.multiple_of,
        has_retries=scout.has_retries,
    )


def _improved(
    trial: Callable[[int], Trial],
    prediction: Prediction,
    size: int | None,
    trials: Sequence[Trial],
    *,
    capacity_bytes: int,
    options: SearchOptions,
) -> int | None:
    """Try one larger batch size where the recommended one leaves much more free than it has to.

    The simulation says which one. A search that was led astray by one uneven batch size can end
    further below the headroom than needed.

    Args:
        trial: Tries a batch size.
        prediction: Has the simulation, if there is one.
        size: The batch size that was recommended.
        trials: Every trial until now.
        capacity_bytes: The bytes that a recommendation counts on.
        options: The options of the search.
    """
    scout, step = prediction.scout, prediction.step
    kept = next((each for each in reversed(trials) if each.batch_size == size), None)
    if kept is None or size is None or scout is None or step is None:
        return size
    limit_bytes = search.limit_of(capacity_bytes, options.headroom)
    if not search.leaves_much_more(kept, limit_bytes, capacity_bytes=capacity_bytes):
        return size
    # What is larger than a batch size that failed, or that left too little, was not meant either.
    failed = (
        each.batch_size
        for each in trials
        if each.batch_size > size and not search.has_headroom(each, limit_bytes)
    )
    above = search.larger(
        lambda batch_size: scout.trial(step, batch_size),
        kept,
        limit_bytes=limit_bytes,
        multiple_of=options.multiple_of,
        below=min(failed, default=size + 1),
    )
    if above is not None and search.has_headroom(trial(above), limit_bytes):
        return above
    return size


def run_trial(backend: Backend, step: TrainingStep, batch_size: int, *, is_first: bool) -> Trial:
    """Try a batch size; report an image size that the model refuses as a user's mistake.

    Args:
        backend: The backend that runs the trial.
        step: The step to train, with its precision chosen.
        batch_size: Samples in each micro-batch.
        is_first: No earlier trial has shown that the step runs.

    Raises:
        UsageError: The model refuses images of the size that was asked for.
    """
    try:
        return backend.trial(step, batch_size)
    except Exception as error:
        size = step.options.image_size
        if is_first and size is not None and getattr(error, "raised_in_step", False):
            raise UsageError(
                f"{step.name} cannot be trained on images of {size[0]}x{size[1]}: {error}"
            ) from error
        raise


def _does_not_fit(step: TrainingStep, backend: Backend, found: search.Found) -> DoesNotFitError:
    capacity = backend.capacity()
    smallest = min(found.trials, key=lambda trial: trial.batch_size)
    needed = backend.needed_bytes(step, smallest.batch_size)
    what = (
        f"it needs {format_bytes(needed)}"
        if needed is not None
        else f"it ran out at {format_bytes(smallest.peak_reserved_bytes or 0)}"
    )
    return DoesNotFitError(
        f"{step.name} does not fit even at batch size {smallest.batch_size}: {what}, and "
        f"{format_bytes(capacity.usable_bytes)} are available ({capacity.origin}).",
        needed_bytes=needed,
    )
