"""Plans as arithmetic: exact sums, fewest steps, an effective batch that never changes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.errors import UsageError
from memfit.partition import (
    Parts,
    Speed,
    check_target,
    cut,
    equal_part,
    share_of,
    shares_by,
    sizes_to_time,
    split,
)
from memfit.records import Objective

SAMPLES = st.integers(1, 5000)
LARGEST = st.integers(1, 700)
UNITS = st.sampled_from([1, 2, 8, 12])


@given(SAMPLES, LARGEST, UNITS)
def test_parts_sum_up_and_none_is_too_large(samples: int, largest: int, unit: int) -> None:
    """The parts are few and differ by at most one unit, except one; larger ones come first."""
    parts = cut(samples, largest, multiple_of=unit)
    usable = largest // unit * unit or largest
    assert sum(parts) == samples
    assert max(parts) == parts[0] <= largest
    # The multiple is given up if the last part would be too small; then there can be fewer.
    assert len(parts) in (-(-samples // usable), -(-samples // largest)) or samples <= largest
    assert len(parts) == 1 or samples > largest
    assert list(parts) == sorted(parts, reverse=True)
    assert min(parts) >= 1
    odd = [part for part in parts if part % unit]
    assert len(odd) <= 1 or max(parts) - min(parts) <= 1
    if unit <= largest:
        assert max(parts) - min(parts) < 2 * unit


@given(SAMPLES, LARGEST, UNITS, st.integers(1, 9))
def test_no_part_is_too_small_where_that_can_be(
    samples: int, largest: int, unit: int, smallest: int
) -> None:
    """The multiple is given up before the number of parts."""
    parts = cut(samples, largest, multiple_of=unit, smallest=smallest)
    assert sum(parts) == samples
    assert len(parts) == len(cut(samples, largest, multiple_of=unit, smallest=1)) or (
        unit > 1 and len(parts) == -(-samples // largest)
    )
    if len(parts) > 1:
        assert parts[-1] >= min(smallest, samples // -(-samples // largest))
    assert cut(samples, parts[0], multiple_of=unit, smallest=smallest) == parts


@pytest.mark.parametrize(
    ("samples", "largest", "unit", "expected"),
    [
        (17, 8, 8, (6, 6, 5)),
        (33, 16, 8, (16, 9, 8)),
        (9, 4, 1, (3, 3, 3)),
        (9, 2, 1, (2, 2, 2, 2, 1)),
        (25, 8, 8, (7, 6, 6, 6)),
        (23, 16, 8, (16, 7)),
    ],
)
def test_parts_are_as_even_as_the_multiple_allows(
    samples: int, largest: int, unit: int, expected: tuple[int, ...]
) -> None:
    """A last part of one sample, which batch norm may refuse, is avoided where possible."""
    assert cut(samples, largest, multiple_of=unit) == expected


@given(SAMPLES, LARGEST, UNITS)
def test_cutting_by_the_first_part_cuts_the_same(samples: int, largest: int, unit: int) -> None:
    """A loop that knows only the micro-batch size makes the plan's parts."""
    parts = cut(samples, largest, multiple_of=unit)
    assert cut(samples, parts[0], multiple_of=unit) == parts


@given(SAMPLES, st.integers(1, 16), LARGEST, LARGEST, UNITS)
def test_the_largest_micro_batch_takes_the_fewest_steps(
    samples: int, ranks: int, whole: int, accumulating: int, unit: int
) -> None:
    """If the share fits whole there is one step; else the largest micro-batch decides."""
    samples = max(samples, ranks)
    parts = split(
        samples,
        world_size=ranks,
        largest_whole=whole,
        largest_accumulating=accumulating,
        multiple_of=unit,
    )
    share = share_of(samples, ranks)
    assert sum(parts.sizes) == share
    if share <= whole:
        assert parts.sizes == (share,)
    else:
        usable = accumulating // unit * unit or accumulating
        assert parts.sizes[0] <= accumulating
        expected = 1 if share <= accumulating else -(-share // usable)
        if expected > 1 and share % usable == 1 and usable < accumulating:
            # A last part of one sample is avoided, if need be with parts that are no multiples.
            assert -(-share // accumulating) <= len(parts.sizes) <= expected
        else:
            assert len(parts.sizes) == expected


@given(SAMPLES, st.integers(1, 16), LARGEST, UNITS)
def test_even_parts_are_equal_or_refused(samples: int, ranks: int, largest: int, unit: int) -> None:
    """All parts of all ranks are equal, and sum to the requested effective batch."""
    samples = max(samples, ranks)
    try:
        parts = split(
            samples,
            world_size=ranks,
            largest_accumulating=largest,
            objective=Objective.EVEN,
            multiple_of=unit,
        )
    except UsageError:
        share = samples // ranks
        fitting = range(unit, min(share, largest) + 1, unit)
        assert samples % ranks or not any(share % part == 0 for part in fitting)
        return
    assert len(set(parts.sizes)) == 1
    assert sum(parts.sizes) * ranks == samples
    assert parts.sizes[0] % unit == 0
    assert equal_part(samples // ranks, largest, multiple_of=unit) == parts.sizes[0]


@given(
    SAMPLES,
    LARGEST,
    st.dictionaries(st.integers(1, 700), st.floats(1, 1e4), min_size=1, max_size=6),
)
def test_the_fastest_is_no_slower_than_the_fewest_steps(
    samples: int, largest: int, measured: dict[int, float]
) -> None:
    """This is by measured speeds, and never above the largest micro-batch."""
    speeds = [Speed(batch_size=size, samples_per_second=rate) for size, rate in measured.items()]

    def parts(objective: Objective) -> Parts:
        return split(samples, largest_accumulating=largest, objective=objective, speeds=speeds)

    fastest, fewest = parts(Objective.FASTEST), parts(Objective.LARGEST)
    assert sum(fastest.sizes) == samples
    assert max(fastest.sizes) <= largest
    assert fastest.samples_per_second is not None
    assert fewest.samples_per_second is not None
    assert fastest.samples_per_second >= fewest.samples_per_second * (1 - 1e-9)
    assert cut(samples, fastest.sizes[0]) == fastest.sizes


def test_a_smaller_micro_batch_can_be_the_fastest() -> None:
    """A slow largest size is avoided and the gain is reported; noise changes nothing."""
    dip = [
        Speed(batch_size=16, samples_per_second=100.0),
        Speed(batch_size=32, samples_per_second=60.0),
    ]
    parts = split(64, largest_accumulating=32, objective=Objective.FASTEST, speeds=dip)
    assert parts.sizes == (16,) * 4
    assert "67% faster than the fewest micro-batches, of 32" in parts.remarks[0]
    noise = [
        Speed(batch_size=16, samples_per_second=101.0),
        Speed(batch_size=32, samples_per_second=100.0),
    ]
    parts = split(64, largest_accumulating=32, objective=Objective.FASTEST, speeds=noise)
    assert parts.sizes == (32, 32)
    assert parts.remarks == (
        "The plan with the fewest micro-batches was the fastest that was measured.",
    )


def test_speeds_between_measured_ones_are_interpolated() -> None:
    """Half way between two sizes the speed is half way; below the smallest its time is used."""
    speeds = [
        Speed(batch_size=10, samples_per_second=100.0),
        Speed(batch_size=30, samples_per_second=200.0),
    ]
    assert split(20, largest_whole=20, speeds=speeds).samples_per_second == pytest.approx(150)
    assert split(5, largest_whole=5, speeds=speeds).samples_per_second == pytest.approx(50)
    assert split(60, largest_whole=60, speeds=speeds).samples_per_second == pytest.approx(200)


@pytest.mark.parametrize(
    ("arguments", "sizes", "says"),
    [
        (
            {"effective_batch_size": 64, "largest_accumulating": 30},
            (22, 21, 21),
            "the parts differ and are weighted by their samples; equal parts would be 4 x 16.",
        ),
        (
            {"effective_batch_size": 100, "largest_accumulating": 60, "multiple_of": 8},
            (56, 44),
            "there are no equal parts that are multiples of 8",
        ),
        (
            {"effective_batch_size": 61, "largest_accumulating": 30, "objective": Objective.EVEN},
            (1,) * 61,
            (
                "The equal parts of 61 nearest to 30 are of size 1. 60 (3 x 20) samples can be cut "
                "better."
            ),
        ),
        (
            {"effective_batch_size": 100, "largest_whole": 100, "multiple_of": 8},
            (100,),
            "The whole batch, 100, is not a multiple of 8.",
        ),
        (
            {"effective_batch_size": 10, "world_size": 4, "largest_whole": 3},
            (3,),
            (
                "10 samples cannot be shared equally by 4 ranks: the first 2 ranks take 3 and the "
                "others 2"
            ),
        ),
        (
            {"effective_batch_size": 9, "world_size": 4, "largest_whole": 3},
            (3,),
            "the first rank takes 3 and the others 2",
        ),
    ],
)
def test_a_plan_says_why_its_parts_differ(
    arguments: dict[str, Any], sizes: tuple[int, ...], says: str
) -> None:
    """It says which parts differ, and which would be equal."""
    parts = split(**arguments)
    assert parts.sizes == sizes
    assert says in " ".join(parts.remarks)


@pytest.mark.parametrize(
    ("target", "ranks", "says"),
    [
        (0, 1, "effective batch size must be at least 1, not 0"),
        (-8, 1, "at least 1, not -8"),
        (64.5, 1, "must be a whole number, not 64.5"),
        ("64", 1, "must be a whole number, not '64'"),
        (float("nan"), 1, "must be a whole number, not nan"),
        (float("inf"), 1, "must be a whole number, not inf"),
        (True, 1, "must be a whole number, not True"),
        (
            3,
            4,
            "shared by 4 ranks, because each rank needs at least one sample. Give at least 4",
        ),
        (64, 0, "world size must be at least 1, not 0"),
    ],
)
def test_targets_that_cannot_be_get_a_sentence(target: object, ranks: object, says: str) -> None:
    """They are refused before anything is tried."""
    with pytest.raises(UsageError, match=says):
        check_target(target, ranks)


def test_whole_numbers_of_any_kind_are_targets() -> None:
    """1e3 is a thousand."""
    assert check_target(1e3, 2) == (1000, 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"effective_batch_size": 10, "world_size": 4, "objective": Objective.EVEN},
            "equally by 4 ranks. The nearest effective batch sizes that can: 8 and 12",
        ),
        (
            {
                "effective_batch_size": 100,
                "largest_accumulating": 60,
                "multiple_of": 8,
                "objective": Objective.EVEN,
            },
            r"cut into equal parts of at most 60 that are multiples of 8\. 96 \(2 x 48\)",
        ),
        (
            {"effective_batch_size": 8, "objective": Objective.FASTEST},
            "has no real seconds",
        ),
    ],
)
def test_what_has_no_plan_gets_a_sentence(arguments: dict[str, Any], says: str) -> None:
    """The message has the nearest target that has a plan."""
    with pytest.raises(UsageError, match=says):
        split(**arguments)


def test_halves_of_the_largest_are_timed() -> None:
    """Each size is timed once, in the multiples that were asked for."""
    assert sizes_to_time(100) == (100, 50, 25, 12)
    assert sizes_to_time(64, multiple_of=16) == (64, 32, 16)
    assert sizes_to_time(1) == (1,)


@given(st.lists(LARGEST, min_size=1, max_size=9), SAMPLES)
def test_shares_follow_what_cards_have_room_for(limits: list[int], more: int) -> None:
    """They sum up, each rank has a sample, and all need as many micro-batches as the whole does."""
    samples = len(limits) - 1 + more
    shares = shares_by(samples, limits)
    assert sum(shares) == samples
    assert min(shares) >= 1
    num_steps = -(-samples // sum(limits))
    if all(samples * limit >= sum(limits) for limit in limits):
        assert all(share <= num_steps * limit for share, limit in zip(shares, limits, strict=True))
