"""Sizes are read and written."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.errors import UsageError
from memfit.units import (
    GIB,
    MIB,
    format_bytes,
    format_parts,
    parse_bytes,
    parse_count,
    parse_image_size,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 * GIB),
        ("1500 MiB", 1500 * MIB),
        ("24GB", 24 * 10**9),
        ("24g", 24 * GIB),
        ("0.5GiB", GIB // 2),
        ("1234567", 1_234_567),
        ("1tib", 1024 * GIB),
        (7_777_777, 7_777_777),
        (8e9, 8 * 10**9),
        (np.int64(7_777_777), 7_777_777),
    ],
)
def test_sizes_are_read(text: str | float, expected: int) -> None:
    """They have binary or decimal units in any case, fractions, or no unit."""
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("8GBB", "did you mean '8GB'"),
        ("8 gibs", "did you mean '8GiB'"),
        ("8 potatoes", "there is no unit 'potatoes'; write, say, '8GiB'"),
        ("many", "write a number and a unit"),
        ("", "write a number and a unit"),
        ("-3GiB", "write a number and a unit"),
        ("0", "at least one byte"),
        (-1, "at least one byte"),
        (8.5, "write a whole number of bytes"),
        (float("nan"), "write a whole number of bytes"),
        (True, "write a whole number of bytes"),
        ("16", "means 16 bytes, which is too little. Did you mean '16GiB'"),
        (8192, "Did you mean '8192MiB'"),
    ],
)
def test_what_is_no_size_gets_a_sentence(text: str | int, says: str) -> None:
    """The message has the value and, if a unit is near, the nearest size."""
    with pytest.raises(UsageError, match=says) as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


@given(st.integers(1, 2**50))
def test_written_sizes_read_back_within_their_digits(num_bytes: int) -> None:
    """The figure in a report is right to the digits that it shows."""
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (20 * MIB, "20.0 MiB"),
        (1500 * MIB, "1500 MiB"),
        (24268 * MIB, "23.7 GiB"),
        (-3 * MIB, "-3.0 MiB"),
        (2000 * GIB, "2000 GiB"),
    ],
)
def test_sizes_are_written_in_binary_units(num_bytes: int, text: str) -> None:
    """GiB is never called GB."""
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("size", "expected"),
    [(224, (224, 224)), ("224", (224, 224)), ("320x240", (320, 240)), ((5, 6), (5, 6))],
)
def test_image_sizes_are_read(size: int | str | tuple[int, int], expected: tuple[int, int]) -> None:
    """One number is a square; two are height and width."""
    assert parse_image_size(size) == expected


@pytest.mark.parametrize("size", ["0", "12x0", "x", "large", (0, 5), -4, 1.5])
def test_what_is_no_image_size_gets_a_sentence(size: object) -> None:
    """The message has the value."""
    with pytest.raises(UsageError, match="is not an image size"):
        parse_image_size(size)  # type: ignore[arg-type]


def test_parts_are_written_as_sums() -> None:
    """Equal parts are written together."""
    assert format_parts((64,)) == "1 x 64"
    assert format_parts((32, 32)) == "2 x 32"
    assert format_parts((56, 44)) == "56 + 44"
    assert format_parts((22, 22, 20)) == "2 x 22 + 20"


def test_counts_are_whole_numbers_of_any_type() -> None:
    """NumPy's numbers count too; anything else gets a sentence."""
    assert parse_count("The batch size", np.int64(4)) == 4
    assert type(parse_count("The batch size", np.int64(4))) is int
    assert parse_count("The batch size", 4.0) == 4
    for value, says in ((0, "at least 1, not 0"), (2.5, "a whole number, not 2.5"), ("4", "'4'")):
        with pytest.raises(UsageError, match=says):
            parse_count("The batch size", value)
