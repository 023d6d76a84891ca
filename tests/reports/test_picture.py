"""The main picture of a profile."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from memfit.errors import UsageError
from memfit.records import Role
from memfit.reports.picture import check_format, draw, series_by_role
from memfit.units import MIB
from reports.profiles import PROFILE, with_many_events


def test_an_svg_has_its_words_and_is_the_same_every_time(tmp_path: Path) -> None:
    """Text stays text, and two drawings of one profile are identical files."""
    one, other = tmp_path / "one.svg", tmp_path / "other.svg"
    draw(PROFILE, one)
    draw(PROFILE, other)
    assert one.read_bytes() == other.read_bytes()
    root = ET.fromstring(one.read_text(encoding="utf-8"))  # noqa: S314 - just drawn
    words = " ".join(root.itertext())
    for expected in ("net, batch size 4", "activations saved for backward: 200 MiB", "backward"):
        assert expected in words
    assert "FRAGMENTATION" not in words


def test_a_large_step_stays_small(tmp_path: Path) -> None:
    """A picture of 20,000 events is small enough for a page."""
    path = tmp_path / "large.svg"
    draw(with_many_events(20_000), path)
    assert path.stat().st_size < 400_000


def test_a_png_is_a_png(tmp_path: Path) -> None:
    """The file's ending says the format."""
    path = tmp_path / "picture.png"
    draw(PROFILE, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_roles_over_time_sum_to_the_allocated_bytes() -> None:
    """At every moment the areas sum to the bytes that the allocator handed out."""
    series = series_by_role(PROFILE)
    sums = tuple(sum(series[role][moment] for role in Role) for moment in range(8))
    assert sums == PROFILE.timeline.allocated_bytes
    assert series[Role.SLACK] == [0, 7, 7, 7, 0, 0, 0, 0]
    assert series[Role.INPUTS][4] == 20 * MIB


@pytest.mark.parametrize("name", ["picture.gif", "picture"])
def test_an_unknown_ending(name: str) -> None:
    """It is refused, and the message has the known endings."""
    with pytest.raises(UsageError, match=r"\.svg, \.png or \.pdf"):
        check_format(Path(name))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """If the picture cannot be written, the error is one sentence."""
    with pytest.raises(UsageError, match="cannot be written"):
        draw(PROFILE, tmp_path / "nowhere" / "picture.svg")
