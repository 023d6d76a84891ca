"""A sweep and a choice, in the terminal and as tables of values."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console, RenderableType

from memfit.accuracies import best_of
from memfit.errors import UsageError
from memfit.records import (
    Averaging,
    Choice,
    ChoiceRow,
    Evaluation,
    Precision,
    Source,
    StepOptions,
    Sweep,
    SweepRow,
)
from memfit.reports.sweep import (
    choice_rows,
    ordered,
    render,
    render_choice,
    row_words,
    sweep_rows,
)
from memfit.reports.sweep_page import page
from memfit.units import GIB, MIB

ROW = SweepRow(
    model="resnet50",
    family="resnet",
    device="Tesla T4",
    source=Source.SIMULATED,
    options=StepOptions(precision=Precision.AMP_FP16, optimizer="adamw"),
    capacity_bytes=14 * GIB,
    max_batch_size=100,
    recommended_batch_size=90,
    edge_found=True,
    peak_bytes=13 * GIB,
    bytes_per_sample=100 * MIB,
    num_parameters=25_557_032,
    forward_flops=8_200_000_000,
)
SMALLER = dataclasses.replace(
    ROW, model="resnet18", max_batch_size=400, recommended_batch_size=380, num_parameters=11_689_512
)
FAILED = dataclasses.replace(
    ROW,
    model="eva_giant_patch14_560",
    max_batch_size=None,
    recommended_batch_size=None,
    peak_bytes=None,
    reason="it does not fit even at batch size 1.",
)
SWEEP = Sweep(
    rows=(ROW, FAILED, SMALLER),
    gpus=("Tesla T4",),
    num_steps=3,
    torch_version="2.15.0",
    timm_version="1.0.31",
)


def text(shown: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_table_has_every_figure_and_the_failures() -> None:
    """It says that nothing was measured."""
    shown = text(render(SWEEP))
    line = next(line for line in shown.splitlines() if line.startswith("resnet50"))
    best = best_of("resnet50")
    assert best is not None
    figures = f"{best.top1_percent:.1f}% 100 90 13.0 GiB 100 MiB 25.6 M 8.2 GFLOP"
    assert line.split()[1:] == figures.split()
    assert "eva_giant_patch14_560: it does not fit even at batch size 1." in shown
    assert "3 models on 1 card, simulated with torch 2.15.0 and timm 1.0.31" in shown


def test_an_amd_cards_edge_is_not_exact() -> None:
    """Its largest batch size is `about` so many, and a sentence says why, on the page too."""
    near = dataclasses.replace(SWEEP, rows=(dataclasses.replace(ROW, is_approximate=True),))
    for shown in (text(render(near)), row_words(near.rows)):
        assert "about 100" in shown
    for shown in (text(render(near)), page(near)):
        plain = " ".join(shown.replace("&#39;", "'").split())
        assert "AMD's cards are simulated with the scratch memory" in plain
    assert "about 100" not in text(render(SWEEP))
    assert SweepRow.from_dict(near.rows[0].to_dict()).is_approximate


def test_rows_are_sorted_and_filtered() -> None:
    """Figures begin with the largest, and names with A."""
    assert [row.model for row in ordered(SWEEP.rows, "largest")] == ["resnet18", "resnet50"]
    assert [row.model for row in ordered(SWEEP.rows, "parameters")] == ["resnet50", "resnet18"]
    assert [row.model for row in ordered(SWEEP.rows, "model")] == ["resnet18", "resnet50"]
    assert ordered(SWEEP.rows, "accuracy")[0].model == "resnet50"
    assert [row.model for row in ordered(SWEEP.rows, "asked", min_batch_size=101)] == ["resnet18"]
    assert "1 more rows fit" in text(render(SWEEP, top=1))
    with pytest.raises(UsageError, match="not sorted by 'colour'"):
        ordered(SWEEP.rows, "colour")


def test_an_interrupted_sweep_says_so() -> None:
    """The number of all steps is known."""
    shown = text(render(dataclasses.replace(SWEEP, num_steps=9, is_complete=False)))
    assert "interrupted: 3 of 9 are done" in shown


def test_rows_of_values() -> None:
    """A missing value is None, and records come back from their dictionaries."""
    names, first, failed, _ = sweep_rows(SWEEP.rows)
    assert dict(zip(names, first, strict=True))["forward_flops"] == 8_200_000_000
    assert dict(zip(names, failed, strict=True))["max_batch_size"] is None
    sized = dataclasses.replace(
        ROW, options=dataclasses.replace(ROW.options, image_size=(96, 64), model_kwargs=(("a", 1),))
    )
    habits = StepOptions(ema=Averaging.CPU, frozen=("blocks.*",), evaluate=Evaluation.IN_TRAINING)
    for row in (*SWEEP.rows, sized, dataclasses.replace(ROW, options=habits)):
        assert SweepRow.from_dict(row.to_dict()) == row
    assert row_words((ROW,)) == "resnet50: Tesla T4 100"
    assert row_words((FAILED,)) == f"{FAILED.model}: {FAILED.reason}"


CHOSEN = ChoiceRow(
    model="resnet50.a1_in1k",
    device="Tesla T4",
    source=Source.SIMULATED,
    options=StepOptions(precision=Precision.AMP_FP16, optimizer="adamw", image_size=(224, 224)),
    top1_percent=81.2,
    top1_image_size=288,
    micro_batch_sizes=(90, 90, 76),
    recommended_micro_batch_size=90,
    checkpointed_micro_batch_size=180,
    is_exact=False,
    peak_bytes=13 * GIB,
    num_parameters=25_557_032,
)


def test_a_choice_says_what_accumulation_costs() -> None:
    """The accuracy names its image size where another is planned."""
    choice = Choice(
        device="Tesla T4",
        effective_batch_size=256,
        rows=(CHOSEN, dataclasses.replace(CHOSEN, micro_batch_sizes=(), reason="too large.")),
        num_tried=2,
        num_known=3,
        accuracy_source="From timm, 2025-10-30.",
    )
    shown = text(render_choice(choice))
    # A model that needs too many steps has a plan and a reason; it is not in the table.
    slow = dataclasses.replace(CHOSEN, model="slow", reason="it needs 3 accumulation steps.")
    assert "slow: it needs 3 accumulation steps." in text(
        render_choice(dataclasses.replace(choice, rows=(CHOSEN, slow)))
    )
    assert "81.2% (at 288)" in shown
    assert "2 x 90 + 76" in shown
    assert "batch norm: not exact" in shown
    assert "180 (2.0x)" in shown
    assert "too large." in shown
    assert "From timm, 2025-10-30." in shown
    none = dataclasses.replace(choice, rows=(), num_tried=0, is_complete=False)
    assert text(render_choice(none)).splitlines()[:2] == [
        "Tesla T4, effective batch 256",
        "0 of 3 models were tried. It was interrupted, so better models may be missing.",
    ]
    names, first, _ = choice_rows(choice)
    assert dict(zip(names, first, strict=True))["accumulation_steps"] == 3
    assert ChoiceRow.from_dict(CHOSEN.to_dict()) == CHOSEN
