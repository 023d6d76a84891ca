"""Tests of a probe's report, made from invented records."""

from __future__ import annotations

import dataclasses
import io

from rich.console import Console

from memfit.records import (
    Capacity,
    DeviceProcess,
    Evaluation,
    Outcome,
    Precision,
    ProbeResult,
    Source,
    StepOptions,
    Survey,
    SurveyAnswer,
    Trial,
)
from memfit.reports import probe_page
from memfit.reports.probe import render, step_words
from memfit.reports.short import as_text
from memfit.reports.survey import render as render_survey
from memfit.units import GIB, MIB


def trial(batch_size: int, peak_mib: int, **changes: object) -> Trial:
    made = Trial(
        batch_size=batch_size,
        outcome=Outcome.FITS,
        source=Source.MEASURED,
        peak_reserved_bytes=peak_mib * MIB,
        step_seconds=batch_size / 100,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


FAILED = {"outcome": Outcome.OUT_OF_MEMORY, "step_seconds": None}
RESULT = ProbeResult(
    subject="resnet50",
    device="NVIDIA GeForce RTX 3090",
    source=Source.MEASURED,
    options=StepOptions(precision=Precision.AMP_BF16, optimizer="adamw"),
    capacity=Capacity(usable_bytes=23 * GIB, total_bytes=24 * GIB, origin="free on the device"),
    max_batch_size=212,
    recommended_batch_size=200,
    edge_found=True,
    headroom=0.05,
    multiple_of=8,
    trials=(
        trial(2, 900),
        trial(200, 22000),
        trial(213, 23500, **FAILED),
        trial(212, 23300, num_alloc_retries=1),
    ),
    environment=(),
    seconds=12.345,
    torch_version="2.11.0",
)


def text(result: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(result)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def test_the_whole_report() -> None:
    """The text is exactly what a user sees on a plain terminal of 80 columns."""
    expected = """\
resnet50 on NVIDIA GeForce RTX 3090
amp-bf16 · adamw
23.0 GiB usable (free on the device)

batch  outcome            peak  retries  s/step  samples/s
    2  fits            900 MiB        0    0.02        100
  200  fits           21.5 GiB        0       2        100
  213  out of memory  22.9 GiB        0
  212  fits           22.8 GiB        1    2.12        100

largest      212  measured: it fitted, and 213 ran out of memory
recommended  200  21.5 GiB at the peak; 6% kept free, no retries, multiple of 8

Batch size 212 fitted only with allocator retries, which are slow. The
recommended batch size needs none.
Measured in 4 trials (1 ran out) and 12.3 s with torch 2.11.0."""
    assert text(render(RESULT)) == expected


def test_much_more_free_than_asked_is_said_with_its_reason() -> None:
    """The share is that of the trial, not the one that was asked for."""
    trials = (trial(96, 20000), *RESULT.trials[2:])
    result = dataclasses.replace(
        RESULT, recommended_batch_size=96, multiple_of=1, trials=trials, headroom=0.05
    )
    shown = text(render(result), width=200)
    assert "19.5 GiB at the peak; 15% kept free (5% asked), no retries" in shown
    assert "More than 5% is kept free because reserved memory does not grow evenly" in shown
    ended = dataclasses.replace(result, max_batch_size=96, edge_found=False, trials=trials[:1])
    assert "does not grow evenly" not in text(render(ended), width=200)


def test_a_size_that_fitted_once_and_ran_out_later_is_said() -> None:
    """Without the sentence, one row of the table denies another."""
    fitted = trial(213, 23300, num_alloc_retries=3)
    result = dataclasses.replace(RESULT, trials=(*RESULT.trials[:2], fitted, *RESULT.trials[2:]))
    shown = text(render(result), width=200)
    assert "Batch size 213 fitted in one trial and ran out of memory in another" in shown
    assert "Batch size 212 fitted only with allocator retries" in shown
    assert "in another" not in text(render(RESULT), width=200)
    counted = dataclasses.replace(result, max_batch_size=213)
    assert "in another" not in text(render(counted), width=200)


def test_an_evaluation_alone_names_no_optimizer() -> None:
    """Beside the state of a training run there is one."""
    for evaluate, has_optimizer in ((Evaluation.ALONE, False), (Evaluation.IN_TRAINING, True)):
        options = StepOptions(precision=Precision.FP32, optimizer="adamw", evaluate=evaluate)
        assert ("adamw" in step_words(options)) is has_optimizer


def test_what_there_is_to_say_is_said() -> None:
    """Other processes, leftovers, growth, the environment, and a search that was cut short."""
    result = dataclasses.replace(
        RESULT,
        source=Source.SIMULATED,
        options=StepOptions(
            precision=Precision.FP32,
            image_size=(320, 240),
            num_classes=10,
            channels_last=True,
            grad_checkpointing=True,
            accumulate=True,
            model_kwargs=(("drop_rate", 0.1),),
        ),
        capacity=dataclasses.replace(
            RESULT.capacity,
            other_processes=(
                DeviceProcess(pid=3, name="python3", used_bytes=2 * GIB),
                DeviceProcess(pid=4, name="Xorg", used_bytes=None),
            ),
        ),
        edge_found=False,
        recommended_batch_size=None,
        multiple_of=1,
        trials=(trial(212, 900, left_behind_bytes=3 * MIB, peak_grows=True),),
        environment=("A=1",),
    )
    shown = text(render(result), width=200)
    for part in (
        "fp32 · 320x240 px · 10 classes · channels last · gradient checkpointing",
        "accumulating · drop_rate=0.1",
        "python3 (pid 3) holds 2048 MiB",
        "Xorg (pid 4) holds an unknown amount",
        "simulated: the limit of the search",
        "no batch size that fits leaves 5% kept free",
        "Trials ran with A=1",
        "Up to 3.0 MiB stayed allocated",
        "still grew when the trial ended at batch size 212",
        "Simulated in 1 trial (0 ran out)",
    ):
        assert part in shown


def test_a_simulation_is_not_timed() -> None:
    """Nothing ran, so the table has no columns for speed."""
    trials = tuple(
        dataclasses.replace(trial, source=Source.SIMULATED, step_seconds=None)
        for trial in RESULT.trials
    )
    shown = text(render(dataclasses.replace(RESULT, source=Source.SIMULATED, trials=trials)))
    assert "s/step" in text(render(RESULT))
    assert "s/step" not in shown
    assert "batch  outcome            peak  retries\n" in shown


def test_what_ran_out_below_what_fits_is_said() -> None:
    """Memory does not always grow with the batch, and the report says so."""
    holed = dataclasses.replace(
        RESULT, trials=(*RESULT.trials, trial(205, 23400, **FAILED)), recommended_batch_size=200
    )
    shown = text(render(holed), width=200)
    assert "it fitted, and 213 ran out of memory; below it 205 ran out too" in shown
    assert "205 ran out of memory although a larger batch fits" in shown


def test_what_was_tried_twice_is_listed_once() -> None:
    """A repeated trial with another outcome is shown."""
    again = (*RESULT.trials, trial(212, 23300, num_alloc_retries=1))
    shown = text(render(dataclasses.replace(RESULT, trials=again)))
    assert shown.count("  212  fits") == 1
    assert "in 5 trials (1 ran out, 1 repeated)" in shown
    differing = (*RESULT.trials, trial(212, 23500, **FAILED))
    shown = text(render(dataclasses.replace(RESULT, trials=differing)))
    assert shown.count("  212  fits") == 1
    assert shown.count("  212  out of memory") == 1


def test_a_simulation_proves_nothing() -> None:
    """The edge was found, but no step ran."""
    assert RESULT.proved
    simulated = dataclasses.replace(RESULT, source=Source.SIMULATED)
    assert simulated.edge_found
    assert simulated.to_dict()["proved"] is False


def test_another_vendors_kernels_give_no_exact_edge() -> None:
    """The edge of an AMD card is `about` so many samples, and the report says why."""
    exact = dataclasses.replace(RESULT, source=Source.SIMULATED)
    near = dataclasses.replace(
        exact, trials=tuple(dataclasses.replace(t, is_approximate=True) for t in exact.trials)
    )
    survey = Survey(subject="resnet50", answers=(SurveyAnswer(gpu="AMD card", result=near),))
    shown = text(render(near), width=200)
    assert "about 212  simulated: 212 fitted and 213 ran out, with NVIDIA's kernels" in shown
    for rendered in (
        shown,
        text(render_survey(survey), width=200),
        str(as_text(near)),
        as_text(survey),
        probe_page.page(near),
        probe_page.survey_page(survey),
    ):
        assert "about 212" in rendered
        assert "it fitted" not in rendered
    assert "NVIDIA's kernels: the largest batch size is near" in text(render_survey(survey), 200)
    assert near.to_dict()["is_approximate"] is True
    assert exact.to_dict()["is_approximate"] is False
    assert "about" not in text(render(exact))
