"""Plans, surveys of plans and explorations as text, made from invented records."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

from accumulation.parts import plan_of
from rich.console import Console, RenderableType

from memfit.records import (
    Alternative,
    Exploration,
    Outcome,
    Plan,
    PlanAnswer,
    PlanSurvey,
    Precision,
    Recomputation,
    Source,
    StepOptions,
    Trial,
)
from memfit.reports import plan_page
from memfit.reports.exploration_page import page
from memfit.reports.plan import render, render_exploration, render_survey
from memfit.reports.probe import step_words
from memfit.reports.short import register
from memfit.units import GIB, MIB


def text_of(renderable: RenderableType) -> str:
    console = Console(width=110, file=io.StringIO(), record=True)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def example() -> Plan:
    trial = Trial(
        batch_size=22,
        outcome=Outcome.FITS,
        source=Source.MEASURED,
        peak_reserved_bytes=900 * MIB,
        step_seconds=2.0,
        num_micro_batches=2,
    )
    return dataclasses.replace(
        plan_of(64, 22),
        max_micro_batch_size=25,
        recommended_micro_batch_size=24,
        peak_reserved_bytes=900 * MIB,
        samples_per_second=22.0,
        trials=(trial,),
        remarks=("3 steps do not divide 64.",),
        seconds=3.21,
    )


def test_a_plan_shows_its_parts_both_limits_and_why() -> None:
    """The whole text is compared."""
    assert text_of(render(example())) == (
        "net on cpu\n"
        "fp32 · accumulating\n"
        "1024 MiB usable (given)\n"
        "\n"
        "batch  outcome     peak  retries  s/step  samples/s\n"
        "   22  fits     900 MiB        0       2         22\n"
        "\n"
        "effective batch  64           samples a step\n"
        "plan             22 + 2 x 21  3 micro-batches a step\n"
        "peak             900 MiB      measured; 124 MiB of 1024 MiB left\n"
        "largest          25           micro-batch that fits: 26 ran out of memory\n"
        "recommended      24           micro-batch with 5% kept free: the plan's limit\n"
        "speed            22           samples/s on each rank, measured\n"
        "\n"
        "3 steps do not divide 64.\n"
        "Measured in 1 trial (0 ran out) and 3.2 s with torch 2.15."
    )


def test_ranks_and_a_limit_that_was_not_looked_for() -> None:
    """The text says what is for the first rank, and where larger sizes were not tried."""
    plan = dataclasses.replace(plan_of(10, 3, world_size=4), edge_found=False)
    text = text_of(render(plan))
    assert "10     samples a step, 4 ranks" in text
    assert "1 x 3  one step, no accumulation on the first rank" in text
    assert "largest          ≥ 3    micro-batch that fits; no more is needed" in text
    even = text_of(render(plan_of(16, 2, world_size=4)))
    assert "2 x 2  2 micro-batches a step on each rank" in even


def test_a_survey_is_one_table() -> None:
    """What does not fit says so, and all of it is simulated."""
    survey = PlanSurvey(
        subject="net",
        effective_batch_size=64,
        world_size=2,
        answers=(
            PlanAnswer(gpu="A", plan=example()),
            PlanAnswer(gpu="B", plan=None, reason="does not fit even at batch size 1"),
        ),
    )
    text = text_of(render_survey(survey))
    assert "net: 64 samples a step over 2 ranks" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "A fp32 22 + 2 x 21 900 MiB 124 MiB" in rows
    assert "B does not fit" in rows
    assert "Simulated, not measured" in text


def test_a_survey_keeps_the_names_of_cards_whole_in_80_columns() -> None:
    """The longest name of the common cards, beside a plan of uneven parts."""
    plan = dataclasses.replace(example(), micro_batch_sizes=(114,) * 7 + (113,) * 2)
    survey = PlanSurvey(
        subject="net",
        effective_batch_size=1024,
        world_size=1,
        answers=(PlanAnswer(gpu="NVIDIA GeForce RTX 2080 Ti", plan=plan),),
    )
    out = io.StringIO()
    Console(file=out, width=80).print(render_survey(survey))
    (row,) = [line for line in out.getvalue().splitlines() if "2080" in line]
    assert "RTX 2080 Ti" in row
    assert "7 x 114 + 2 x 113" in row


FITS_40 = Alternative(
    change="",
    costs="",
    options=StepOptions(precision=Precision.FP32),
    micro_batch_sizes=(32, 32),
    recommended_micro_batch_size=40,
    edge_found=True,
    peak_reserved_bytes=7 * GIB,
)


def exploration_of(baseline: Alternative, *alternatives: Alternative) -> Exploration:
    return Exploration(
        subject="net",
        device="a card",
        capacity=example().capacity,
        effective_batch_size=64,
        world_size=1,
        baseline=baseline,
        alternatives=alternatives,
    )


def test_an_exploration_shows_what_each_change_does() -> None:
    """The unchanged step comes first; a change that is impossible says why."""
    options = StepOptions(precision=Precision.FP32)
    as_it_is = Alternative(change="", costs="", options=options, reason="it needs 9 GiB")
    leaner = dataclasses.replace(
        FITS_40, change="gradient checkpointing", costs="a second forward pass"
    )
    smaller = dataclasses.replace(leaner, edge_found=False, change="a smaller image")
    exploration = exploration_of(as_it_is, leaner, smaller)
    lines = text_of(render_exploration(exploration)).splitlines()
    assert (
        lines[0]
        == "What one change would do for net on a card with 1024 MiB usable, 64 samples a step"
    )
    assert lines[4].split() == ["as", "it", "is", "none", "it", "needs", "9", "GiB"]
    shown = "gradient checkpointing 40 2 x 32 7168 MiB a second forward pass"
    assert " ".join(lines[5].split()) == shown
    assert lines[6].split()[:5] == ["a", "smaller", "image", "≥", "40"]
    assert exploration.to_dict()["alternatives"][0]["accumulation_steps"] == 2
    assert as_it_is.micro_batch_size is None


def test_a_change_that_makes_no_more_fit_is_not_offered() -> None:
    """It is named below the table, with what would fit. JSON has all of them."""

    def changed(change: str, **fields: Any) -> Alternative:
        return dataclasses.replace(FITS_40, change=change, costs="something", **fields)

    fewer = changed("optimizer lion", recommended_micro_batch_size=38)
    same = changed("channels last", peak_reserved_bytes=6 * GIB)
    none = changed("checkpointing", micro_batch_sizes=(), reason="net has none.")
    more = changed("a smaller image", recommended_micro_batch_size=50)
    enough = changed("bf16 weights", recommended_micro_batch_size=64, edge_found=False)
    exploration = exploration_of(FITS_40, same, none, fewer, more, enough)
    assert exploration.gains == (more, enough)
    text = text_of(render_exploration(exploration))
    table, _, below = text.partition("fits: a micro-batch")
    assert "lion" not in table
    assert "a smaller image" in table
    assert (
        "Tried, and no more fits. channels last: 40; checkpointing: net has none; optimizer lion: "
        "38." in " ".join(below.split())
    )
    shown = page(exploration)
    assert "optimizer lion: 38" in shown
    assert shown.count("optimizer lion") == 1
    assert "a smaller image" in shown
    assert len(exploration.to_dict()["alternatives"]) == 5


def test_if_all_fits_a_change_is_offered_that_needs_less() -> None:
    """Then more samples are no gain."""
    whole = Alternative(
        change="",
        costs="",
        options=StepOptions(precision=Precision.FP32),
        micro_batch_sizes=(64,),
        recommended_micro_batch_size=64,
        edge_found=False,
        peak_reserved_bytes=7 * GIB,
    )
    less = dataclasses.replace(whole, change="a", peak_reserved_bytes=6 * GIB)
    more = dataclasses.replace(whole, change="b", peak_reserved_bytes=8 * GIB)
    exploration = Exploration(
        subject="net",
        device="a card",
        capacity=example().capacity,
        effective_batch_size=64,
        world_size=1,
        baseline=whole,
        alternatives=(less, more),
    )
    assert (exploration.gains, exploration.others) == ((less,), (more,))


def test_the_limit_of_a_plan_says_that_larger_parts_needed_retries() -> None:
    """5% are not the reason if a larger micro-batch fitted only with allocator retries."""
    plan = example()
    retried = dataclasses.replace(plan.trials[0], batch_size=25, num_alloc_retries=1)
    text = text_of(render(dataclasses.replace(plan, trials=(*plan.trials, retried))))
    assert "micro-batch with 5% kept free, no retries: the plan's limit" in text


def test_what_is_recomputed_is_said_with_its_cost() -> None:
    """The table, the page, the short form and the step's words say it, and name a few blocks."""
    blocks = ("layer1.0", "layer2.0")
    found = dataclasses.replace(
        plan_of(64, 64),
        options=StepOptions(precision=Precision.FP32, checkpoint=blocks, compile=True),
        recomputation=Recomputation(
            blocks=blocks, num_blocks=16, forward_share=0.214, forward_share_of_all=0.97
        ),
    )
    text = " ".join(text_of(render(found)).split())
    assert "2 of 16" in text
    assert "blocks: 21% of the operations of forward again, 97% for all blocks" in text
    assert "compiled · layer1.0, layer2.0 recomputed" in text
    assert "2 of 16 blocks" in plan_page.page(found)
    register()
    assert "2 of 16 blocks" in str(found)
    many = dataclasses.replace(found.options, checkpoint=tuple(map(str, range(9))))
    assert "9 blocks recomputed" in step_words(many)
