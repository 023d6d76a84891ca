"""Pages fit a phone and a desktop: nothing is cut off, and nothing covers anything else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from memfit.records import Alternative, Exploration, Precision, StepOptions, Survey, SurveyAnswer
from memfit.reports import exploration_page, probe_page
from memfit.reports.html import line_chart
from memfit.reports.profile_page import page
from memfit.units import MIB
from reports.profiles import PROFILE
from reports.test_page import COMMAND, PROBE, browser, needs_browser, shown

__all__ = ["browser"]

PHONE, DESKTOP = 390, 1400
OVERLAPS = (Path(__file__).parent / "overlaps.js").read_text(encoding="utf-8")


@needs_browser
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("kind", ["profile", "probe", "command", "survey", "exploration"])
def test_nothing_is_cut_or_covered(browser: Any, tmp_path: Path, width: int, kind: str) -> None:
    """This holds for titles, ticks, the labels of lines, the legend and the toolbar."""
    long_name = "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"
    cards = tuple(
        SurveyAnswer(gpu=name, result=dataclasses.replace(PROBE, device=name))
        for name in (long_name, "NVIDIA GeForce RTX 2080 Ti", "Tesla T4")
    )
    options = StepOptions(precision=Precision.FP32)
    change = "fused attention, which timm was told not to use"
    exploration = Exploration(
        subject="net",
        device="a card",
        capacity=PROBE.capacity,
        effective_batch_size=64,
        world_size=1,
        baseline=Alternative(
            change="",
            costs="",
            options=options,
            micro_batch_sizes=(32, 32),
            recommended_micro_batch_size=40,
            peak_reserved_bytes=800 * MIB,
        ),
        alternatives=(
            Alternative(
                change=change,
                costs="none",
                options=options,
                micro_batch_sizes=(64,),
                recommended_micro_batch_size=80,
                peak_reserved_bytes=900 * MIB,
            ),
        ),
    )
    text = {
        "profile": lambda: page(PROFILE),
        "probe": lambda: probe_page.page(PROBE),
        "command": lambda: probe_page.command_page(COMMAND),
        "survey": lambda: probe_page.survey_page(Survey(subject="net", answers=cards)),
        "exploration": lambda: exploration_page.page(exploration),
    }[kind]()
    sized = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sized)
    try:
        drawn = shown(browser, text, tmp_path)
        found, page_width = drawn.execute_script(OVERLAPS)
        assert found == []
        assert page_width <= width
        drawn.execute_script(
            "document.querySelectorAll('.legend button').forEach((b) => b.click())"
        )
        assert drawn.get_log("browser") == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
def test_a_phone_shows_long_titles_and_whole_tables(browser: Any, tmp_path: Path) -> None:
    """A long path is broken, a column without values is left out, a diamond is a diamond below."""
    blocks = tuple(dataclasses.replace(block, bytes_per_sample=None) for block in PROFILE.blocks)
    path = f"python {'folder/' * 12}train.py"
    profile = dataclasses.replace(PROFILE, subject=path, blocks=blocks, cards=PROFILE.cards[:1])
    simulated = tuple(dataclasses.replace(trial, step_seconds=None) for trial in PROBE.trials)
    probe = dataclasses.replace(PROBE, trials=simulated, predictions=())
    phone = {"width": PHONE, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        drawn = shown(browser, page(profile), tmp_path)
        found, page_width = drawn.execute_script(OVERLAPS)
        assert found == []
        assert page_width <= PHONE
        heads = (
            "return [...document.querySelectorAll('#blocks th')].filter((h) => !h.hidden).length"
        )
        assert drawn.execute_script(heads) == 6
        assert (
            drawn.execute_script("return document.querySelectorAll('#cards .diamond').length") == 1
        )
        drawn = shown(browser, probe_page.page(probe), tmp_path)
        table = "document.querySelector('#trials .scroll')"
        hidden = f"return {table}.scrollWidth - {table}.clientWidth"
        assert drawn.execute_script(hidden) <= 0
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_limits_that_are_close_share_a_label() -> None:
    """Two labels at almost one height would be drawn over each other, and so would a line."""
    card = PROFILE.cards[0]
    cards = tuple(
        dataclasses.replace(card, gpu=gpu, total_bytes=mib * MIB)
        for gpu, mib in (("A", 7836), ("B", 7806), ("C", 16_000), ("D", 24_000), ("E", 8200))
    )
    text = page(dataclasses.replace(PROFILE, cards=cards))
    assert "A has 7836 MiB; E has 8200 MiB; 1 more below" in text
    assert "C has 15.6 GiB" in text
    assert "D has 23.4 GiB" in text


def test_no_axis_has_half_a_sample() -> None:
    """The batch sizes of a few trials that are close together have ticks at whole numbers."""

    def axis(sizes: list[float]) -> dict[str, Any]:
        lines = {"fits": (sizes, [1.0] * len(sizes))}
        chart = line_chart(lines, x_title="batch size", y_title="GiB")
        found: dict[str, Any] = chart["layout"]["xaxis"]
        return found

    assert axis([256.0])["dtick"] == 1
    assert "dtick" not in axis([1.0, 256.0])
