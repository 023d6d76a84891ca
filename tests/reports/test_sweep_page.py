"""The page of a sweep, in a real browser without a network."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import timm

from memfit.accuracies import accuracies, best_of
from memfit.cards import COMMON_GPUS
from memfit.records import Precision, Sweep
from memfit.reports.sweep_page import _data, page
from reports.test_page import browser, needs_browser
from reports.test_sweep_report import FAILED, ROW, SWEEP

__all__ = ["browser"]

MOST_BYTES = 3_000_000
MOST_SECONDS = 2
PHONE, DESKTOP = 390, 1400
OTHER = "NVIDIA GeForce RTX 3060"


def all_of_timm() -> Sweep:
    """Return a sweep of the size of all of timm, with figures that are made up."""
    rows = tuple(
        dataclasses.replace(
            ROW,
            model=name,
            family=name.partition("_")[0],
            device=gpu,
            max_batch_size=None if number % 40 == 0 else 1 + number * (1 + place),
            reason="It does not fit." if number % 40 == 0 else None,
            num_parameters=10_000 * (1 + number),
        )
        for number, name in enumerate(timm.list_models())
        for place, gpu in enumerate(COMMON_GPUS)
    )
    return dataclasses.replace(SWEEP, rows=rows, gpus=COMMON_GPUS)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "zoo.html"
    path.write_text(page(all_of_timm()), encoding="utf-8")
    return path


def opened(browser: Any, path: Path, width: int = DESKTOP) -> Any:
    sized = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sized)
    browser.get(path.as_uri())
    return browser


def seconds_used(browser: Any) -> float:
    """Return the CPU seconds that the page's thread has taken so far."""
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return float(next(each["value"] for each in metrics if each["name"] == "TaskDuration"))


def names(browser: Any) -> list[str]:
    script = "return [...document.querySelectorAll('#body td button')].map((b) => b.textContent)"
    found: list[str] = browser.execute_script(script)
    return found


def put(browser: Any, key: str, value: str) -> None:
    browser.execute_script(
        "const field = document.getElementById(arguments[0]); field.value = arguments[1];"
        "field.dispatchEvent(new Event('input', {bubbles: true}))",
        key,
        value,
    )


def test_all_of_timm_is_small(written: Path) -> None:
    """One file, under 3 MB, that asks nothing of a network."""
    text = written.read_text(encoding="utf-8")
    assert len(text.encode()) < MOST_BYTES
    assert "default-src 'none'" in text


def test_each_accuracy_has_the_licence_of_its_weights() -> None:
    """It is the one that timm names."""
    for each in accuracies()[::50]:
        config = timm.models.get_pretrained_cfg(each.model)
        assert each.licence == (config.license or "unknown")


@needs_browser
def test_it_opens_fast_filters_and_sorts(browser: Any, written: Path) -> None:
    """Search, the filters, the columns and the command of a model."""
    # The page's own seconds, because other processes may have the cores.
    browser.get("about:blank")
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    before = seconds_used(browser)
    drawn = opened(browser, written)
    assert seconds_used(drawn) - before < MOST_SECONDS
    assert drawn.execute_script("return document.body.dataset.drawn")
    points = "return document.querySelectorAll('#scatter .point').length"
    everything = drawn.execute_script(points)
    assert everything > 500
    outside = drawn.execute_script("return document.getElementById('outside').textContent")
    assert re.match(r"\d+ models are below the plot, with less than [67]\d%\. A double", outside)
    put(drawn, "search", "convnext tiny")
    assert not drawn.find_element("id", "outside").is_displayed()
    assert names(drawn)
    assert all("convnext" in name and "tiny" in name for name in names(drawn))
    assert 0 < drawn.execute_script(points) < everything
    put(drawn, "search", "")
    put(drawn, "parameters", "5000000")
    few = int(
        drawn.execute_script("return document.getElementById('count').textContent").split()[2]
    )
    assert few == 500
    put(drawn, "parameters", "")
    put(drawn, "licence", "cc-by-nc-4.0")
    shown = names(drawn)
    assert shown
    assert {best.licence for name in shown if (best := best_of(name))} == {"cc-by-nc-4.0"}
    drawn.execute_script("document.querySelector('#body button').click()")
    words = drawn.execute_script("return document.getElementById('chosen-words').textContent")
    assert words.endswith("licence: cc-by-nc-4.0.")
    put(drawn, "licence", "")
    by_name = "document.querySelector('#head button').click()"
    drawn.execute_script(by_name)
    assert names(drawn) == sorted(names(drawn))
    assert names(drawn)[0] == timm.list_models()[0]
    drawn.execute_script("document.querySelector('#body button').click()")
    command = drawn.execute_script("return document.getElementById('command').textContent")
    assert command.startswith(f"memfit plan {timm.list_models()[0]} --gpu ")
    assert "--precision amp-fp16" in command
    assert drawn.get_log("browser") == []


@needs_browser
def test_the_keyboard_keeps_its_place(browser: Any, written: Path) -> None:
    """A key on a model or a family draws the page again, and the next key goes on from there."""
    drawn = opened(browser, written)
    for part in ("#body tr:nth-of-type(3) button", "#legend button:nth-of-type(2)"):
        button = drawn.find_element("css selector", part)
        name = button.text
        button.send_keys("\n")
        assert drawn.switch_to.active_element.text == name


@needs_browser
def test_the_card_changes_the_figures(browser: Any, written: Path) -> None:
    """The table shows the batch sizes of the chosen card."""
    drawn = opened(browser, written)
    put(drawn, "search", "resnet18")
    cell = "return document.querySelector('#body td.number:nth-of-type(4)').textContent"
    small = int(drawn.execute_script(cell))
    put(drawn, "card", str(len(COMMON_GPUS) - 1))
    assert int(drawn.execute_script(cell)) == 1 + (small - 1) * len(COMMON_GPUS)


@needs_browser
def test_why_a_model_does_not_fit_is_the_chosen_cards_reason(browser: Any, tmp_path: Path) -> None:
    """Another card has another reason, or fits."""
    rows = tuple(
        dataclasses.replace(
            ROW, device=gpu, max_batch_size=None, reason=f"{ROW.model} does not fit {gpu}."
        )
        for gpu in COMMON_GPUS
    )
    path = tmp_path / "reasons.html"
    path.write_text(page(dataclasses.replace(SWEEP, rows=rows, gpus=COMMON_GPUS)), encoding="utf-8")
    drawn = opened(browser, path)
    put(drawn, "card", "3")
    drawn.execute_script("document.querySelector('#body button').click()")
    words = drawn.execute_script("return document.getElementById('chosen-words').textContent")
    assert words.startswith(f"{COMMON_GPUS[3]}: {ROW.model} does not fit {COMMON_GPUS[3]}. ")


@needs_browser
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_nothing_is_wider_than_the_screen(browser: Any, written: Path, width: int) -> None:
    """The table scrolls in its own frame."""
    drawn = opened(browser, written, width)
    assert drawn.execute_script("return document.documentElement.scrollWidth") <= width
    drawn.execute_script("document.querySelector('#body button').click()")
    wide = (
        "return [...document.querySelectorAll('.filters *, #legend *, h1, h2, .note')]"
        ".filter((e) => e.getBoundingClientRect().right > innerWidth).length"
    )
    assert drawn.execute_script(wide) == 0


def test_models_with_images_of_several_sizes_are_shown_together() -> None:
    """The size is a column of the table, and no step of its own."""
    sized = dataclasses.replace(ROW.options, image_size=(288, 288))
    rows = (ROW, dataclasses.replace(ROW, options=sized))
    data = _data(dataclasses.replace(SWEEP, rows=rows, gpus=(ROW.device,)))
    assert (len(data["steps"]), data["step"]) == (1, [0, 0])
    assert data["size"][1] == [288, 288]


def own_precisions() -> Sweep:
    """Return a sweep of one model for which each card chose its precision."""
    options = dataclasses.replace(ROW.options, precision=Precision.AMP_BF16)
    other = dataclasses.replace(ROW, device=OTHER, options=options, max_batch_size=70)
    return dataclasses.replace(SWEEP, rows=(ROW, other), gpus=(ROW.device, OTHER))


def test_each_cards_own_precision_is_one_step() -> None:
    """With `auto`, a card with another precision has the same step, and its own figures."""
    data = _data(own_precisions())
    assert (len(data["steps"]), data["model"]) == (1, [ROW.model])
    assert data["largest"] == [[100], [70]]
    assert data["own"] == ["amp-fp16", "amp-bf16"]
    assert "--precision" not in data["options"][0]


@needs_browser
def test_a_step_that_a_card_was_not_tried_with_is_not_offered(browser: Any, tmp_path: Path) -> None:
    """Such a model does not count as one that does not fit."""
    found = own_precisions()
    fp32 = dataclasses.replace(ROW.options, precision=Precision.FP32)
    rows = (*found.rows, dataclasses.replace(ROW, options=fp32, max_batch_size=50))
    path = tmp_path / "steps.html"
    path.write_text(page(dataclasses.replace(found, rows=rows)), encoding="utf-8")
    drawn = opened(browser, path)
    put(drawn, "card", "1")
    offered = (
        "return [...document.getElementById('step').options].filter((o) => !o.disabled)"
        ".map((o) => o.textContent)"
    )
    assert drawn.execute_script(offered) == ["amp-bf16, adamw"]
    assert names(drawn) == [ROW.model]
    assert (
        drawn.execute_script("return document.getElementById('count').textContent") == "1 of 1 fit"
    )
    assert drawn.get_log("browser") == []


@needs_browser
def test_a_sweep_in_which_nothing_fits(browser: Any, tmp_path: Path) -> None:
    """The page opens, and says so, also in place of an empty plot."""
    path = tmp_path / "none.html"
    path.write_text(page(dataclasses.replace(SWEEP, rows=(FAILED,))), encoding="utf-8")
    drawn = opened(browser, path)
    assert (
        drawn.execute_script("return document.getElementById('count').textContent") == "0 of 1 fit"
    )
    plot = drawn.find_element("id", "scatter").text
    assert " ".join(plot.split()) == "None of these models fits and has a published accuracy."
    assert drawn.get_log("browser") == []
