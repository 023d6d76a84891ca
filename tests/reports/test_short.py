"""A printed result is a short table, and so is one in a notebook."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from types import SimpleNamespace

from accumulation.parts import plan_of

from memfit.records import (
    Alternative,
    Capacity,
    Choice,
    ChoiceRow,
    Exploration,
    Outcome,
    PlanAnswer,
    PlanSurvey,
    Precision,
    ProbeResult,
    Source,
    StepOptions,
    Survey,
    SurveyAnswer,
    Trial,
)
from memfit.records.looks import html_of
from memfit.reports import short, short_findings
from memfit.units import GIB
from reports.profiles import PROFILE
from reports.test_equivalence_report import EQUAL
from reports.test_sweep_report import SWEEP

short.register()
short_findings.register()

TRIAL = Trial(
    batch_size=60, outcome=Outcome.FITS, source=Source.SIMULATED, peak_reserved_bytes=20 * GIB
)
RESULT = ProbeResult(
    subject="net",
    device="NVIDIA L4",
    source=Source.SIMULATED,
    options=StepOptions(precision=Precision.AMP_BF16, optimizer="adamw"),
    capacity=Capacity(usable_bytes=22 * GIB, total_bytes=23 * GIB, origin="given"),
    max_batch_size=63,
    recommended_batch_size=60,
    edge_found=True,
    headroom=0.05,
    multiple_of=1,
    trials=(TRIAL,),
    environment=(),
    seconds=1.0,
    torch_version="2.15",
)


def test_a_probe_is_four_lines() -> None:
    """The text is compared exactly."""
    assert str(RESULT) == (
        "net on NVIDIA L4: amp-bf16, adamw\n"
        "largest      63  simulated: it fitted, and 64 ran out of memory\n"
        "recommended  60  20.0 GiB at the peak; 9% kept free (5% asked)\n"
        "Simulated, not measured, 22.0 GiB usable, 1 trial."
    )


def test_every_result_is_short_in_print_and_a_table_in_a_notebook() -> None:
    """These are plans, surveys and trials; what does not fit says so."""
    plan = dataclasses.replace(plan_of(64, 30), peak_reserved_bytes=GIB)
    survey = Survey(
        subject="net",
        answers=(
            SurveyAnswer(gpu="A", result=RESULT),
            SurveyAnswer(gpu="B <small>", result=None, reason="no"),
        ),
        remarks=("No GPU was named.",),
    )
    plans = PlanSurvey(
        subject="net",
        effective_batch_size=64,
        world_size=2,
        answers=(PlanAnswer(gpu="A", plan=plan), PlanAnswer(gpu="B", plan=None)),
    )
    for record, signs in (
        (plan, ("64 samples a step", "22 + 2 x 21", "1024 MiB of 1024 MiB")),
        (survey, ("63", "60", "does not fit", "No GPU was named.")),
        (plans, ("over 2 ranks", "22 + 2 x 21", "does not fit")),
        (TRIAL, ("batch size 60", "fits", "20.0 GiB")),
    ):
        text, shown = str(record), record._repr_html_()
        assert len(text.splitlines()) <= 8
        assert shown is not None
        assert shown.count("<tr>") <= 6
        for sign in signs:
            assert sign in text
            assert sign in shown
    assert "B &lt;small&gt;" in (html_of(survey) or "")


def test_a_notebook_shows_the_picture_too() -> None:
    """It is an SVG in the page itself, because a notebook may be read elsewhere."""
    for record in (RESULT, plan_of(64, 30), PROFILE):
        shown = html_of(record)
        assert shown is not None
        found = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', shown)
        assert found is not None
        assert "<svg" in base64.b64decode(found[1]).decode()
    assert "<img" not in (html_of(TRIAL) or "<img")


def test_what_has_no_look_is_its_fields() -> None:
    """It prints like a dataclass."""
    options = StepOptions()
    assert str(options) == repr(options)
    assert options._repr_html_() is None


def test_what_is_found_about_a_step_is_short_too() -> None:
    """Verifications, profiles, explorations and sweeps: 30 lines at most, also in a notebook."""
    options = StepOptions(precision=Precision.FP32)
    now = Alternative(
        change="",
        costs="",
        options=options,
        micro_batch_sizes=(32, 32),
        recommended_micro_batch_size=40,
        edge_found=True,
        peak_reserved_bytes=GIB,
    )
    exploration = Exploration(
        subject="net",
        device="a card",
        capacity=RESULT.capacity,
        effective_batch_size=64,
        world_size=1,
        baseline=now,
        alternatives=(
            dataclasses.replace(now, change="bf16 weights", recommended_micro_batch_size=50),
            dataclasses.replace(now, change="optimizer lion", recommended_micro_batch_size=30),
        ),
    )
    row = dataclasses.replace(SWEEP.rows[0], max_batch_size=123)
    sweep = dataclasses.replace(SWEEP, rows=(row,) * 50)
    choice = Choice(
        device="Tesla T4",
        effective_batch_size=64,
        rows=(
            ChoiceRow(
                model="net.in1k",
                device="Tesla T4",
                source=Source.SIMULATED,
                options=options,
                top1_percent=81.25,
                micro_batch_sizes=(32, 32),
            ),
        ),
        num_tried=3,
        num_known=1371,
        accuracy_source="timm",
    )
    unfit = dataclasses.replace(PROFILE, message="It does not fit: 3 GiB are missing.")
    for record, signs in (
        (EQUAL, ("equal: vit_tiny at 4 x 8", "2e-15", "0 of 3", "fp32")),
        (PROFILE, ("peak", "activations saved for backward", "%", PROFILE.device)),
        (unfit, ("not measured. It does not fit: 3 GiB are missing.",)),
        (
            exploration,
            ("as it is", "bf16 weights", "50", "Tried, and no more fits. optimizer lion"),
        ),
        (sweep, ("largest", "123", "and 38 more")),
        (choice, ("net.in1k", "81.2%", "2 x 32", "3 of 1371 models")),
    ):
        text = str(record)
        assert len(text.splitlines()) <= 30
        assert max(map(len, text.splitlines()[1:-1])) <= 100
        assert all(sign in text for sign in signs), text
        shown = html_of(record)
        assert shown is not None
        assert "<table>" in shown
    assert len(repr(PROFILE)) < 5000
    printer = io.StringIO()
    EQUAL._repr_pretty_(SimpleNamespace(text=printer.write), cycle=False)
    assert printer.getvalue() == str(EQUAL)
