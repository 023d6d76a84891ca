"""A profile's page, in a real browser without a network."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memfit.records import (
    Alternative,
    Capacity,
    CommandProbe,
    Exploration,
    MemoryProfile,
    Outcome,
    Precision,
    ProbeResult,
    Source,
    StepOptions,
    Survey,
    SurveyAnswer,
    Trial,
)
from memfit.reports import exploration_page, probe_page
from memfit.reports.profile_page import page
from memfit.units import MIB
from reports.profiles import PROFILE, with_many_events

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs Debian's chromium and chromium-driver"
)
PROBE = ProbeResult(
    subject="net",
    device="NVIDIA L4",
    source=Source.MEASURED,
    options=StepOptions(precision=Precision.FP32),
    capacity=Capacity(usable_bytes=1000 * MIB, total_bytes=1200 * MIB, origin="free"),
    max_batch_size=8,
    recommended_batch_size=8,
    edge_found=True,
    headroom=0.05,
    multiple_of=1,
    trials=(
        Trial(
            batch_size=8,
            outcome=Outcome.FITS,
            source=Source.MEASURED,
            peak_reserved_bytes=900 * MIB,
            step_seconds=0.5,
        ),
        Trial(
            batch_size=9,
            outcome=Outcome.OUT_OF_MEMORY,
            source=Source.MEASURED,
            peak_reserved_bytes=990 * MIB,
            num_alloc_retries=1,
            step_seconds=0.7,
        ),
    ),
    environment=(),
    seconds=2.0,
    torch_version="2.15.0",
    predictions=tuple(
        Trial(
            batch_size=size,
            outcome=Outcome.FITS,
            source=Source.SIMULATED,
            peak_reserved_bytes=num_bytes * MIB,
        )
        for size, num_bytes in ((8, 910), (9, 1010))
    ),
)
PANELS = ("timeline", "roles", "modules", "cards", "advice", "blocks")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start headless Chromium, and record its console and network."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def opened(browser: Any, profile: MemoryProfile, folder: Path) -> Any:
    """Open a profile's page and wait until it is drawn."""
    return shown(browser, page(profile), folder)


def shown(browser: Any, text: str, folder: Path) -> Any:
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    browser.get(path.as_uri())
    for _ in range(400):
        if browser.execute_script("return document.documentElement.dataset.drawn") == "true":
            return browser
        time.sleep(0.05)
    raise AssertionError(f"not drawn: {browser.get_log('browser')}")


def requests(browser: Any) -> list[str]:
    """Return the addresses that were requested since the last call."""
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


@needs_browser
def test_every_panel_is_drawn_without_errors_or_requests(browser: Any, tmp_path: Path) -> None:
    """The console stays empty, only the file is loaded, and each chart has its shapes."""
    requests(browser)
    drawn = opened(browser, PROFILE, tmp_path)
    assert drawn.get_log("browser") == []
    # No button offers to send the data away.
    buttons = drawn.execute_script(
        "return [...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)"
    )
    assert "Zoom" in buttons
    assert not [title for title in buttons if "hare" in title]
    asked = [url for url in requests(drawn) if not url.startswith(("data:", "blob:"))]
    assert [url.rpartition("/")[2] for url in asked] == ["report.html"]
    shapes = drawn.execute_script(
        "return [...document.querySelectorAll('section.panel')].map((panel) => "
        "[panel.id, panel.querySelectorAll('.chart svg path, tbody tr').length])"
    )
    assert [key for key, _ in shapes] == list(PANELS)
    assert all(count > 3 for _, count in shapes)
    # The sum of the areas at the peak is the allocated bytes there.
    top = drawn.execute_script(
        "return document.querySelector('#timeline .chart').data.filter((t) => t.stackgroup)"
        ".reduce((sum, t) => sum + t.y[3], 0)"
    )
    assert top == pytest.approx(430)


@needs_browser
def test_pointing_at_a_moment_shows_what_lives_there(browser: Any, tmp_path: Path) -> None:
    """The readout follows the mouse, and the arrow keys on the slider."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    drawn = opened(browser, PROFILE, tmp_path)
    readout = drawn.find_element(By.CSS_SELECTOR, "#timeline .moment")
    assert "Event 3, backward: 430 MiB in use" in readout.text
    assert "(the peak)" in readout.text
    assert "activations saved for backward: 200 MiB" in readout.text
    plot = drawn.find_element(By.CSS_SELECTOR, "#timeline .chart .nsewdrag")
    half = plot.size["width"] / 2
    ActionChains(drawn).move_to_element_with_offset(plot, int(-0.97 * half), 20).perform()
    time.sleep(0.3)
    assert "Event 0, forward: 120 MiB in use" in readout.text
    assert "inputs: 20.0 MiB" in readout.text
    assert "activations" not in readout.text
    assert drawn.find_element(By.CSS_SELECTOR, "#timeline .hoverlayer").text
    slider = drawn.find_element(By.CSS_SELECTOR, "#timeline input[type=range]")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert "Event 1, forward: 320 MiB in use" in readout.text


@needs_browser
def test_zooming(browser: Any, tmp_path: Path) -> None:
    """A phase's button shows that phase, in full resolution if there are many events."""
    from selenium.webdriver.common.by import By

    drawn = opened(browser, with_many_events(20_000), tmp_path)

    def moments() -> list[int]:
        found: list[int] = drawn.execute_script(
            "return [...document.querySelector('#timeline .chart').data[0].x]"
        )
        return found

    assert len(moments()) == 1200
    buttons = {
        button.text: button
        for button in drawn.find_elements(By.CSS_SELECTOR, "#timeline [data-zoom]")
    }
    assert list(buttons) == ["whole step", "forward", "backward", "peak"]
    buttons["backward"].click()
    time.sleep(0.3)
    assert min(moments()) >= 10_000
    buttons["peak"].click()
    time.sleep(0.3)
    assert moments() == list(range(9599, 10_399))


@needs_browser
def test_searching_and_sorting_blocks(browser: Any, tmp_path: Path) -> None:
    """The table finds words in any column, and its headers sort."""
    from selenium.webdriver.common.by import By

    drawn = opened(browser, PROFILE, tmp_path)
    panel = drawn.find_element(By.ID, "blocks")

    def rows() -> list[list[str]]:
        return [
            [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
            for row in panel.find_elements(By.CSS_SELECTOR, "tbody tr")
        ]

    assert [row[0] for row in rows()] == ["200 MiB", "100 MiB", "100 MiB", "20.0 MiB", "10.0 MiB"]
    panel.find_element(By.CSS_SELECTOR, "input[type=search]").send_keys("stem TEMPOR")
    assert rows() == [
        [
            "10.0 MiB",
            "temporaries",
            "stem.conv",
            "convolution_backward",
            "net.py:12",
            "",
            "backward",
        ]
    ]
    assert panel.find_element(By.CSS_SELECTOR, ".count").text == "1 found"
    panel.find_element(By.CSS_SELECTOR, "input[type=search]").clear()
    drawn.execute_script(
        "document.querySelector('#blocks input[type=search]').dispatchEvent(new Event('input'))"
    )
    panel.find_elements(By.CSS_SELECTOR, "th button")[2].click()
    assert [row[2] for row in rows()] == ["(batch)", "head", "head", "stem.conv", "stem.conv"]


@needs_browser
def test_twenty_thousand_events_open_quickly(browser: Any, tmp_path: Path) -> None:
    """A large model's page stays below 6 MB, and its first chart is drawn before the others."""
    drawn = opened(browser, with_many_events(20_000), tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 6_000_000
    marks = drawn.execute_script(
        "return performance.getEntriesByType('mark').map((mark) => [mark.name, mark.startTime])"
    )
    assert [name for name, _ in marks] == list(PANELS)


@needs_browser
def test_everything_is_reached_by_keyboard(browser: Any, tmp_path: Path) -> None:
    """Tab goes through links, buttons, the slider, the search and every scrolling table."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    drawn = opened(browser, PROFILE, tmp_path)
    reached = set()
    for _ in range(120):
        drawn.switch_to.active_element.send_keys(Keys.TAB)
        active = drawn.switch_to.active_element
        reached.add((active.tag_name, active.get_attribute("type") or ""))
    assert {("a", ""), ("button", "button"), ("input", "range"), ("input", "search")} <= reached
    assert ("summary", "") in reached
    for chart in drawn.find_elements(By.CSS_SELECTOR, ".chart"):
        assert len(chart.get_attribute("aria-label")) > 20


@needs_browser
def test_dark_and_light(browser: Any, tmp_path: Path) -> None:
    """The background and the charts' text follow the system's scheme."""

    def seen(scheme: str) -> tuple[str, str]:
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
        )
        drawn = opened(browser, PROFILE, tmp_path)
        ground, text = drawn.execute_script(
            "return [getComputedStyle(document.body).backgroundColor, "
            "document.querySelector('#roles .chart').layout.font.color]"
        )
        return ground, text

    assert seen("dark") == ("rgb(20, 23, 27)", "#e7eaee")
    assert seen("light") == ("rgb(255, 255, 255)", "#1b1f24")


@needs_browser
def test_no_text_leaves_its_panel_on_a_phone(browser: Any, tmp_path: Path) -> None:
    """The blocks of a moment have long names, which are cut at the panel's edge."""
    phone = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    module = "layers.0.blocks.1.attention.projection.with.a.long.name"
    blocks = tuple(dataclasses.replace(block, module=module) for block in PROFILE.blocks)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        drawn = opened(browser, dataclasses.replace(PROFILE, blocks=blocks), tmp_path)
        beyond = drawn.execute_script(
            "const panel = document.getElementById('timeline').getBoundingClientRect();"
            "return [...document.querySelectorAll('#timeline .moment *')]"
            ".filter((part) => part.getBoundingClientRect().right > panel.right).length"
        )
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert beyond == 0


@needs_browser
def test_a_probes_page(browser: Any, tmp_path: Path) -> None:
    """Trials, predictions and throughput are drawn, and the table has every trial."""
    from selenium.webdriver.common.by import By

    drawn = shown(browser, probe_page.page(PROBE), tmp_path)
    assert drawn.get_log("browser") == []
    names = drawn.execute_script(
        "return document.querySelector('#memory .chart').data.map((trace) => trace.name)"
    )
    # What is drawn last is on top: predictions nearly always lie below the trials.
    assert names == ["predicted", "ran out of memory", "fits", "recommended: 8"]
    marked = drawn.execute_script(
        "const [trace] = document.querySelector('#memory .chart').data.slice(-1);"
        "return [trace.x[0], trace.marker.symbol]"
    )
    assert marked == [8, "diamond"]
    assert drawn.find_elements(By.CSS_SELECTOR, "#memory .points path")
    assert drawn.find_elements(By.CSS_SELECTOR, "#throughput .chart svg path")
    cells = [
        [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
        for row in drawn.find_elements(By.CSS_SELECTOR, "#trials tbody tr")
    ]
    assert cells == [
        ["9", "out of memory", "990 MiB", "1010 MiB", "1", "", ""],
        ["8", "fits", "900 MiB", "910 MiB", "0", "0.5", "16"],
    ]


COMMAND = CommandProbe(
    command=("python", "train.py", "--batch-size", "{}"),
    device="NVIDIA GeForce RTX 3060",
    source=Source.REHEARSED,
    capacity=PROBE.capacity,
    max_batch_size=8,
    recommended_batch_size=8,
    proved=True,
    headroom=0.05,
    multiple_of=1,
    trials=tuple(
        dataclasses.replace(trial, source=Source.REHEARSED, step_seconds=None)
        for trial in PROBE.trials
    ),
    notes=("Do not trust these figures.", "A note."),
    seconds=30.0,
)


@needs_browser
def test_the_page_of_a_command(browser: Any, tmp_path: Path) -> None:
    """It has the command, every run of it, the doubts as a warning, and no word of measuring."""
    drawn = shown(browser, probe_page.command_page(COMMAND), tmp_path)
    assert drawn.get_log("browser") == []
    names = drawn.execute_script(
        "return document.querySelector('#memory .chart').data.map((trace) => trace.name)"
    )
    assert names == ["ran out of memory", "fits", "recommended: 8"]
    text = drawn.execute_script("return document.body.innerText")
    assert "python train.py --batch-size '{}': the largest batch size" in text
    for words in ("Do not trust these figures.", "A note.", "(9 ran out of memory)", "rehearsed"):
        assert words in text
    assert "measured" not in text


@needs_browser
def test_a_surveys_page(browser: Any, tmp_path: Path) -> None:
    """Every card has its bars; a card on which nothing fits says so."""
    survey = Survey(
        subject="net",
        answers=(
            SurveyAnswer(gpu="NVIDIA L4", result=PROBE),
            SurveyAnswer(gpu="Tesla T4", result=None, reason="too small"),
        ),
    )
    drawn = shown(browser, probe_page.survey_page(survey), tmp_path)
    assert drawn.get_log("browser") == []
    assert "does not fit" in drawn.page_source
    assert "1 of 2 cards" in drawn.page_source


@needs_browser
def test_an_explorations_page(browser: Any, tmp_path: Path) -> None:
    """Each change has its bar, a change that does not fit says so, and the best is named."""
    options = StepOptions(precision=Precision.FP32)
    exploration = Exploration(
        subject="net",
        device="NVIDIA L4",
        capacity=PROBE.capacity,
        effective_batch_size=64,
        world_size=1,
        baseline=Alternative(change="", costs="", options=options, reason="needs 2 GiB"),
        alternatives=(
            Alternative(
                change="gradient checkpointing",
                costs="a second forward",
                options=options,
                micro_batch_sizes=(16, 16, 16, 16),
                recommended_micro_batch_size=20,
                edge_found=True,
                peak_reserved_bytes=800 * MIB,
            ),
        ),
    )
    drawn = shown(browser, exploration_page.page(exploration), tmp_path)
    assert drawn.get_log("browser") == []
    assert "gradient checkpointing: micro-batches of 20 fit" in drawn.page_source
    assert "needs 2 GiB" in drawn.page_source
    bars = drawn.execute_script("return document.querySelector('#sizes .chart').data[0].x")
    assert bars == [0, 20]


@pytest.mark.parametrize("evil", ["</script><script>alert(1)</script>", "<!--<script>"])
def test_names_cannot_break_out_of_the_page(evil: str) -> None:
    """A module named like markup stays text, even if it could end a script or hide it."""
    blocks = tuple(dataclasses.replace(block, module=evil) for block in PROFILE.blocks)
    text = page(dataclasses.replace(PROFILE, subject=evil, blocks=blocks))
    assert evil not in text
    assert not re.search(r'(src|href)="https?:', text[: text.index("<script>")])
