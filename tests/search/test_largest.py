"""Tests of the search on made-up devices."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import statistics
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memfit.records import Outcome, Source, Trial
from memfit.search import Found, find_largest, recommended

MIB = 2**20


@dataclasses.dataclass
class Device:
    """A made-up device with bytes by batch size, and a capacity."""

    bytes_of: Callable[[int], int]
    capacity_bytes: int
    reports_bytes: bool = True
    fits: Callable[[int], bool] | None = None
    tried: list[int] = dataclasses.field(default_factory=list)

    def does_fit(self, batch_size: int) -> bool:
        if self.fits is not None:
            return self.fits(batch_size)
        return self.bytes_of(batch_size) <= self.capacity_bytes

    def trial(self, batch_size: int) -> Trial:
        self.tried.append(batch_size)
        fits = self.does_fit(batch_size)
        peak = min(self.bytes_of(batch_size), self.capacity_bytes) if self.reports_bytes else None
        return Trial(
            batch_size=batch_size,
            outcome=Outcome.FITS if fits else Outcome.OUT_OF_MEMORY,
            source=Source.MEASURED,
            peak_reserved_bytes=peak,
        )

    def largest(self, hint: int | None = None, ceiling: int = 2**20) -> Found:
        return find_largest(
            self.trial, capacity_bytes=self.capacity_bytes, hint=hint, ceiling=ceiling
        )

    def edge(self, ceiling: int = 2**20) -> int:
        """Return the largest batch size that fits a monotone device, by bisection."""
        low, high = 0, ceiling + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.does_fit(middle) else (low, middle)
        return low


def certificate_holds(device: Device, found: Found) -> bool:
    """Return whether the answer fitted in the last trial and the next size only failed."""
    assert found.batch_size is not None
    outcomes = [(trial.batch_size, trial.fits) for trial in found.trials]
    last_fit = max(i for i, seen in enumerate(outcomes) if seen == (found.batch_size, True))
    failures = [i for i, (_, fits) in enumerate(outcomes) if not fits]
    return (found.batch_size + 1, False) in outcomes and last_fit > max(failures)


def affine_bytes(fixed: int, per_sample: int, batch_size: int) -> int:
    return fixed + per_sample * batch_size


def most_trials(answer: int) -> int:
    return math.floor(2 + 2 * math.log2(answer))


affine = st.builds(
    lambda fixed, per_sample, samples, rest: Device(
        lambda batch_size: fixed + per_sample * batch_size,
        fixed + per_sample * samples + rest % per_sample,
    ),
    fixed=st.integers(0, 10**10),
    per_sample=st.integers(1000, 10**9),
    samples=st.integers(1, 100_000),
    rest=st.integers(0, 10**9),
)


@given(affine)
def test_affine_devices_are_solved_exactly_within_the_promised_trials(device: Device) -> None:
    """If bytes are affine in the batch size, few trials give the exact, proved edge."""
    found = device.largest()
    assert found.batch_size == device.edge()
    assert found.proved
    assert certificate_holds(device, found)
    assert len(found.trials) <= most_trials(device.edge())


@given(affine)
def test_devices_without_retries_are_solved_within_the_promised_trials(device: Device) -> None:
    """If bytes are the step's own, the search follows a line and tries nothing twice."""
    found = find_largest(
        device.trial, capacity_bytes=device.capacity_bytes, ceiling=2**20, has_retries=False
    )
    assert found.batch_size == device.edge()
    assert found.proved
    assert len(set(device.tried)) == len(device.tried) <= most_trials(device.edge())
    extra = len(device.tried)
    answer = recommended(
        device.trial, found, capacity_bytes=device.capacity_bytes, has_retries=False
    )
    if answer.batch_size is not None and answer.batch_size > min(device.tried):
        assert device.bytes_of(answer.batch_size) <= 0.95 * device.capacity_bytes
        assert len(device.tried) == extra


def test_affine_devices_typically_take_under_seven_trials() -> None:
    """Without a hint, most answers take five or six trials, whatever their size."""
    rng = random.Random(0)  # noqa: S311 - made-up devices
    counts = []
    for _ in range(500):
        per_sample = round(10 ** rng.uniform(5, 9))
        fixed = round(10 ** rng.uniform(7, 10))
        answer = round(10 ** rng.uniform(0.5, 4.5))
        device = Device(
            functools.partial(affine_bytes, fixed, per_sample),
            affine_bytes(fixed, per_sample, answer),
        )
        counts.append(len(device.largest().trials))
    assert statistics.median(counts) <= 5
    assert sum(count < 7 for count in counts) >= 0.9 * len(counts)


@given(affine, st.floats(-0.02, 0.02))
def test_a_hint_within_two_percent_needs_at_most_six_trials(device: Device, off: float) -> None:
    """After a good prediction only the proof is left to do."""
    edge = device.edge()
    found = device.largest(hint=max(1, round(edge * (1 + off))))
    assert found.batch_size == edge
    assert certificate_holds(device, found)
    assert len(found.trials) <= 6


@given(affine)
def test_an_exact_hint_needs_its_certificate_and_nothing_else(device: Device) -> None:
    """The sample beyond the edge, and then the edge."""
    edge = device.edge()
    found = device.largest(hint=edge)
    assert found.proved
    assert device.tried == [edge + 1, edge]


@given(affine, st.floats(-0.02, 0.02))
def test_with_a_recommendation_that_was_tried_first_five_trials_do(
    device: Device, off: float
) -> None:
    """The recommendation gives the line its second point."""
    edge = device.edge()
    limit = int(device.capacity_bytes * 0.9)
    known = tuple(device.trial(max(1, size)) for size in (round(edge * 0.9 * (1 + off)),))
    found = find_largest(
        device.trial,
        capacity_bytes=device.capacity_bytes,
        hint=max(1, round(edge * (1 + off))),
        known=known,
        ceiling=200_000,
    )
    assert found.batch_size == edge
    answer = recommended(device.trial, found, capacity_bytes=device.capacity_bytes, headroom=0.1)
    if known[0].fits and device.bytes_of(known[0].batch_size) <= limit:
        assert answer.batch_size is not None
        assert answer.batch_size >= known[0].batch_size
    if off == 0:
        assert len(found.trials) == 3


@given(st.integers(100, 2000), st.floats(0.3, 0.95), st.integers(1, 16))
def test_a_wide_zone_of_retries_is_left_in_few_trials(
    edge: int, zone: float, multiple_of: int
) -> None:
    """Steps double on the way down; then the sizes that were jumped over are tried."""
    calm = int(edge * zone)

    def trial(batch_size: int) -> Trial:
        return Trial(
            batch_size=batch_size,
            outcome=Outcome.FITS if batch_size <= edge else Outcome.OUT_OF_MEMORY,
            source=Source.MEASURED,
            peak_reserved_bytes=10_000_000 if batch_size > calm else batch_size * 1000,
            num_alloc_retries=int(batch_size > calm),
        )

    found = find_largest(trial, capacity_bytes=10_000_000, hint=edge)
    answer = recommended(
        trial, found, capacity_bytes=10_000_000, headroom=0, multiple_of=multiple_of
    )
    assert answer.batch_size is not None
    assert calm - max(calm // 20, 2 * multiple_of) <= answer.batch_size <= calm
    assert answer.batch_size % multiple_of == 0
    assert len(answer.trials) <= 14


@given(affine, st.integers(1, 200_000))
def test_a_wrong_hint_still_ends_at_the_edge(device: Device, hint: int) -> None:
    """A hint decides where the search begins, never where it ends."""
    found = device.largest(hint=hint)
    assert found.batch_size == device.edge()
    assert certificate_holds(device, found)


@given(
    fixed=st.integers(0, 2000 * MIB),
    per_sample=st.integers(MIB // 8, 100 * MIB),
    step=st.sampled_from([2 * MIB, 20 * MIB, 64 * MIB]),
    capacity=st.integers(2500 * MIB, 24_000 * MIB),
)
def test_stepped_memory_is_solved_exactly_within_the_promised_trials(
    fixed: int, per_sample: int, step: int, capacity: int
) -> None:
    """If bytes come in segments, few trials give the exact, proved edge."""
    device = Device(lambda b: -(-(fixed + per_sample * b) // step) * step, capacity)
    found = device.largest()
    assert found.batch_size == device.edge()
    assert certificate_holds(device, found)
    assert len(found.trials) <= most_trials(device.edge())


@given(st.integers(1, 500_000))
def test_a_bare_threshold_is_found_within_the_promised_trials(threshold: int) -> None:
    """If no bytes are reported, doubling and bisection keep the same bound."""
    device = Device(lambda b: b, 10**12, reports_bytes=False, fits=lambda b: b <= threshold)
    found = device.largest()
    assert found.batch_size == threshold
    assert certificate_holds(device, found)
    assert len(found.trials) <= most_trials(threshold)


@given(st.integers(1, 5000), st.integers(1, 10**6))
def test_bytes_that_lie_cost_trials_but_not_the_answer(threshold: int, per_sample: int) -> None:
    """A limit that the bytes do not show (another resource) is found too."""
    device = Device(lambda b: 10**6 + per_sample * b, 10**12, fits=lambda b: b <= threshold)
    found = device.largest()
    assert found.batch_size == threshold
    assert certificate_holds(device, found)
    assert len(found.trials) <= 10 + 3 * math.log2(threshold)


@given(affine, st.integers(0, 2**32), st.floats(0, 0.03))
def test_noisy_bytes_do_not_change_the_answer(device: Device, seed: int, noise: float) -> None:
    """Peaks that vary by a few percent cost trials, but the answer is exact."""
    rng = random.Random(seed)  # noqa: S311 - made-up noise
    exact = device.bytes_of
    noisy = Device(
        lambda b: round(exact(b) * (1 + rng.uniform(-noise, noise))),
        device.capacity_bytes,
        fits=device.does_fit,
    )
    found = noisy.largest()
    assert found.batch_size == device.edge()
    assert certificate_holds(noisy, found)


@given(st.integers(1, 5000), st.integers(-20, 20))
@example(25, -20)
def test_a_hint_on_a_full_device_is_followed_by_small_steps(edge: int, off_permille: int) -> None:
    """Near the edge every trial needs retries and reports the capacity, so bytes do not help."""

    def trial(batch_size: int) -> Trial:
        fits = batch_size <= edge
        return Trial(
            batch_size=batch_size,
            outcome=Outcome.FITS if fits else Outcome.OUT_OF_MEMORY,
            source=Source.SIMULATED,
            peak_reserved_bytes=2**30,
            num_alloc_retries=3,
        )

    hint = max(1, round(edge * (1 + off_permille / 1000)))
    found = find_largest(trial, capacity_bytes=2**30, hint=hint)
    assert found.batch_size == edge
    assert found.proved
    if hint == edge:
        assert len(found.trials) == 2
    assert max(t.batch_size for t in found.trials) <= max(hint, edge) * 17 // 16 + 1


@given(affine, st.sets(st.integers(1, 120), max_size=60))
def test_holes_leave_a_certificate(device: Device, holes: set[int]) -> None:
    """If fits are not monotone, the answer is an edge: it fits and its successor does not."""
    holed = dataclasses.replace(device, fits=lambda b: device.does_fit(b) and b not in holes)
    found = holed.largest()
    if found.batch_size is None:
        assert not holed.does_fit(1)
    else:
        assert certificate_holds(holed, found)
        assert found.batch_size not in holes


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.integers(2, 300))
def test_a_device_that_changes_its_mind_is_not_believed(seed: int, threshold: int) -> None:
    """The answer fitted after all failures, even where a fit is partly luck."""
    rng = random.Random(seed)  # noqa: S311 - made-up noise
    device = Device(
        lambda b: b * MIB,
        threshold * MIB,
        fits=lambda b: b <= threshold * 0.9 or (b <= threshold and rng.random() < 0.5),
    )
    found = device.largest()
    assert found.batch_size is not None
    assert certificate_holds(device, found)


def test_memory_that_falls_at_small_batches_does_not_mislead() -> None:
    """Workspaces can make batch 2 need more than batch 16 (ultralytics/yolov5#9287)."""
    device = Device(
        lambda b: 4000 * MIB + (3000 * MIB if b < 16 else 0) + 100 * MIB * b, 24_000 * MIB
    )
    found = device.largest()
    assert found.batch_size == device.edge() == 200
    assert len(found.trials) <= most_trials(200)


def test_the_ceiling_ends_the_search_without_a_certificate() -> None:
    """A batch size that nobody asked about is not tried."""
    device = Device(lambda b: b, 10**9)
    found = device.largest(ceiling=100)
    assert (found.batch_size, found.proved) == (100, False)
    assert max(device.tried) == 100


def test_nothing_fits() -> None:
    """If one sample does not fit, the result has the failed trials."""
    device = Device(lambda b: 10 + b, 5)
    found = device.largest()
    assert (found.batch_size, found.proved) == (None, False)
    assert device.tried == [2, 1]


def test_the_smallest_batch_is_not_tried_before_two() -> None:
    """A batch norm over single values refuses one sample, and would end the search at once."""
    device = Device(lambda b: 10 + b, 100)
    device.largest()
    assert 1 not in device.tried


def test_a_floor_is_kept() -> None:
    """No size below the floor is tried."""
    device = Device(lambda b: b, 10)
    found = find_largest(device.trial, capacity_bytes=10, floor=8)
    assert found.batch_size == 10
    assert min(device.tried) == 8


@pytest.mark.parametrize(("floor", "ceiling"), [(0, 4), (5, 4)])
def test_impossible_bounds_are_refused(floor: int, ceiling: int) -> None:
    """Bounds without any size between them are the caller's mistake."""
    with pytest.raises(ValueError, match="floor"):
        find_largest(Device(lambda b: b, 10).trial, floor=floor, ceiling=ceiling)


@given(affine, st.floats(0, 0.5), st.sampled_from([1, 8, 32]))
def test_a_recommendation_keeps_its_promises(
    device: Device, headroom: float, multiple_of: int
) -> None:
    """It was tried, keeps the headroom and divides evenly; no larger size does."""
    found = device.largest()
    answer = recommended(
        device.trial,
        found,
        capacity_bytes=device.capacity_bytes,
        headroom=headroom,
        multiple_of=multiple_of,
    )
    limit = int(device.capacity_bytes * (1 - headroom))
    if answer.batch_size is None:
        assert device.bytes_of(multiple_of) > limit or multiple_of > device.edge()
        return
    assert answer.batch_size in device.tried
    assert answer.batch_size % multiple_of == 0
    assert device.bytes_of(answer.batch_size) <= limit
    nxt = answer.batch_size + multiple_of
    assert nxt > device.edge() or device.bytes_of(nxt) > limit
    assert len(answer.trials) <= 2


def test_a_recommendation_needs_no_allocator_retries() -> None:
    """A step that needs retries fits, but it is too slow to be recommended."""

    def trial(batch_size: int) -> Trial:
        return Trial(
            batch_size=batch_size,
            outcome=Outcome.FITS if batch_size <= 100 else Outcome.OUT_OF_MEMORY,
            source=Source.MEASURED,
            peak_reserved_bytes=min(batch_size * 11, 1000),
            peak_allocated_bytes=batch_size * 10,
            num_alloc_retries=int(batch_size > 90),
        )

    found = find_largest(trial, capacity_bytes=1000)
    assert found.batch_size == 100
    answer = recommended(trial, found, capacity_bytes=1000, headroom=0)
    assert answer.batch_size == 90


@pytest.mark.parametrize("wrong", [{"headroom": 1.0}, {"headroom": -0.1}, {"multiple_of": 0}])
def test_impossible_recommendations_are_refused(wrong: dict[str, float]) -> None:
    """A headroom of 1 or below 0, or multiples of 0, are the caller's mistake."""
    device = Device(lambda b: b, 10)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        recommended(device.trial, device.largest(), capacity_bytes=10, **wrong)  # type: ignore[arg-type]


@given(
    fixed=st.integers(20, 200),
    per_sample=st.integers(5, 40),
    edge=st.integers(20, 90),
    bend=st.floats(0, 0.02),
)
def test_a_line_that_errs_upwards_costs_one_cheap_trial(
    fixed: int, per_sample: int, edge: int, bend: float
) -> None:
    """If memory grows a little faster near the edge, the answer still takes few trials."""

    def bytes_of(n: int) -> int:
        return int(MIB * (fixed + per_sample * n * (1 + bend * n / edge)))

    device = Device(bytes_of, (bytes_of(edge) + bytes_of(edge + 1)) // 2)
    found = find_largest(device.trial, capacity_bytes=device.capacity_bytes, has_retries=False)
    assert found.batch_size == edge
    assert found.proved
    assert len(found.trials) <= 7
