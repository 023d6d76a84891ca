"""Records: the values that they refuse, and their plain form."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from memfit.errors import UsageError
from memfit.records import (
    Capacity,
    DeviceProcess,
    Outcome,
    ParameterDifference,
    Precision,
    ProbeResult,
    Source,
    StepOptions,
    Trial,
)

TRIAL = Trial(
    batch_size=8,
    outcome=Outcome.FITS,
    source=Source.MEASURED,
    peak_reserved_bytes=1000,
    step_seconds=0.5,
    num_micro_batches=2,
)
RESULT = ProbeResult(
    subject="resnet18",
    device="CPU",
    source=Source.MEASURED,
    options=StepOptions(precision=Precision.FP32, image_size=(32, 24), model_kwargs=(("a", 1),)),
    capacity=Capacity(
        usable_bytes=2000,
        total_bytes=3000,
        origin="free",
        other_processes=(DeviceProcess(pid=1, name="other", used_bytes=None),),
    ),
    max_batch_size=8,
    recommended_batch_size=None,
    edge_found=False,
    headroom=0.05,
    multiple_of=1,
    trials=(TRIAL,),
    environment=(),
    seconds=1.0,
    torch_version="2.8",
)


def test_samples_per_second_count_every_micro_batch() -> None:
    """Two micro-batches of eight in half a second are 32 samples per second."""
    assert TRIAL.samples_per_second == 32
    assert dataclasses.replace(TRIAL, step_seconds=None).samples_per_second is None


def test_json_has_no_number_that_is_not_finite() -> None:
    """A number that is not finite becomes null."""
    for value in (math.nan, math.inf, -math.inf):
        record = ParameterDifference(
            name="w", relative_error=value, bound=0.0, scale=value, scale_bound=0.0
        )
        plain = record.to_dict()
        assert (plain["relative_error"], plain["scale"]) == (None, None)


def test_a_result_becomes_plain_json() -> None:
    """Nested records, enums and tuples become plain values and can be read back."""
    plain = json.loads(json.dumps(RESULT.to_dict()))
    assert plain == RESULT.to_dict()
    assert plain["schema_version"] == 1
    assert plain["capacity_bytes"] == 2000
    assert plain["options"]["precision"] == "fp32"
    assert plain["options"]["image_size"] == [32, 24]
    assert plain["capacity"]["other_processes"][0]["used_bytes"] is None
    assert plain["trials"][0]["samples_per_second"] == 32
    assert plain["recommended_batch_size"] is None


def test_trials_are_found_by_batch_size() -> None:
    """If a batch size was tried twice, the last trial counts."""
    again = dataclasses.replace(TRIAL, outcome=Outcome.OUT_OF_MEMORY)
    result = dataclasses.replace(RESULT, trials=(TRIAL, again))
    assert result.trial_at(8) is again
    assert result.trial_at(9) is None


def test_records_cannot_be_changed() -> None:
    """Nobody can change a record that was passed on."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        TRIAL.batch_size = 9  # type: ignore[misc]


def test_impossible_records_are_refused() -> None:
    """These are trials of 0 samples, times that are not positive, no classes."""
    with pytest.raises(ValueError, match="batch_size"):
        dataclasses.replace(TRIAL, batch_size=0)
    with pytest.raises(ValueError, match="step_seconds"):
        dataclasses.replace(TRIAL, step_seconds=0.0)
    with pytest.raises(UsageError, match="num_classes"):
        StepOptions(num_classes=0)


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("fp16", "amp-fp16"),
        ("FP16", "amp-fp16"),
        ("float16", "amp-fp16"),
        ("half", "amp-fp16"),
        ("16-mixed", "amp-fp16"),
        ("bf16-mixed", "amp-bf16"),
        ("AMP_BF16", "amp-bf16"),
        ("bfloat16", "amp-bf16 or bf16"),
        ("amp", "amp-fp16 or amp-bf16"),
        ("torch.float32", "fp32"),
        ("32", "fp32"),
        ("auot", "auto"),
    ],
)
def test_a_wrong_precision_gets_the_nearest(given: str, near: str) -> None:
    """The names of other libraries are understood, so that fp16 is not near bf16."""
    with pytest.raises(UsageError, match=f"; did you mean {near}[?] Choose one of fp32, amp-bf16"):
        Precision.named(given)


def test_a_precision_is_named_by_itself_or_its_value() -> None:
    """A training loop has no auto."""
    assert Precision.named("bf16") is Precision.named(Precision.BF16) is Precision.BF16
    with pytest.raises(UsageError, match=r"no precision 'auto'\. Choose one of fp32\.$"):
        Precision.named("auto", known=[Precision.FP32])
