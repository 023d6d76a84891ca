"""What two runs of a command say of the batch sizes that were not run.

The scripts are made up, and run on the model of the allocator. `test_run.py` has real ones.
"""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfit.rehearsal.forecast import Forecast, Recording
from memfit.units import KIB, MIB

from .made_scripts import MadeScript, process_of

CAPACITY = 2048 * MIB
SCRIPT = MadeScript(
    weight_bytes=(5 * MIB, 300 * KIB, 30 * MIB),
    sample_bytes=(700 * KIB, 90 * KIB, 1300 * KIB),
    scratch_bytes=400 * KIB,
)

_sizes = st.integers(1, 12 * MIB)
_layers = st.lists(st.tuples(_sizes, st.integers(512, 2 * MIB)), min_size=1, max_size=5)


def recorded(script: MadeScript, batch_size: int, capacity_bytes: int = CAPACITY) -> Recording:
    """Run a script, and read what it recorded."""
    trial, requests = script.run(batch_size, capacity_bytes)
    recording = Recording.of(trial, process_of(trial), requests, {})
    assert recording is not None
    return recording


def forecast_of(script: MadeScript, *batch_sizes: int) -> Forecast | None:
    """Return the forecast that runs of these batch sizes allow."""
    runs = [recorded(script, size) for size in batch_sizes]
    return Forecast.of(runs, capacity_bytes=CAPACITY)


@given(layers=_layers, scratch_bytes=st.integers(0, MIB), asked=st.integers(3, 2000))
def test_a_forecast_is_what_a_run_would_hold(
    layers: list[tuple[int, int]], scratch_bytes: int, asked: int
) -> None:
    """To the byte, with retries and shortages, where every request grows evenly."""
    script = MadeScript(
        weight_bytes=tuple(weight for weight, _ in layers),
        sample_bytes=tuple(sample for _, sample in layers),
        scratch_bytes=scratch_bytes,
    )
    forecast = forecast_of(script, 2, 9)
    assert forecast is not None
    told, (seen, _) = forecast.trial(asked), script.run(asked, CAPACITY)
    assert (told.fits, told.num_alloc_retries) == (seen.fits, seen.num_alloc_retries)
    assert told.peak_reserved_bytes == seen.peak_reserved_bytes
    assert told.peak_allocated_bytes == seen.peak_allocated_bytes
    assert told.peak_requested_bytes == seen.peak_requested_bytes


def test_scratch_memory_may_be_missing_in_one_run() -> None:
    """It is counted as in the run of the larger batch size."""
    script = dataclasses.replace(SCRIPT, scratch_from=100)
    forecast = forecast_of(script, 2, 200)
    assert forecast is not None
    assert (
        forecast.trial(200).peak_reserved_bytes == script.run(200, CAPACITY)[0].peak_reserved_bytes
    )
    without = dataclasses.replace(SCRIPT, scratch_from=3, scratch_bytes=0)
    assert forecast_of(without, 2, 200) is not None


def test_the_run_with_fewer_steps_is_compared() -> None:
    """Runs settle after different numbers of steps."""
    longer = recorded(dataclasses.replace(SCRIPT, num_steps=6), 2)
    forecast = Forecast.of([recorded(SCRIPT, 200), longer], capacity_bytes=CAPACITY)
    assert forecast is not None
    seen, _ = SCRIPT.run(301, CAPACITY)
    assert forecast.trial(301).peak_reserved_bytes == seen.peak_reserved_bytes


def test_runs_that_do_different_things_say_nothing() -> None:
    """As a script does that evaluates after so many samples."""
    assert forecast_of(dataclasses.replace(SCRIPT, evaluates_below=100), 2, 200) is None
    assert forecast_of(SCRIPT, 200) is None


def test_a_replay_that_is_wrong_says_nothing() -> None:
    """A process may hold more than its requests explain, as with CUDA graphs."""
    run = recorded(SCRIPT, 200)
    more = dataclasses.replace(
        run.trial, peak_reserved_bytes=(run.trial.peak_reserved_bytes or 0) * 11 // 10
    )
    runs = [recorded(SCRIPT, 2), dataclasses.replace(run, trial=more)]
    assert Forecast.of(runs, capacity_bytes=CAPACITY) is None


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_an_allocator_without_a_model_says_nothing(variable: str) -> None:
    """The command's own variables count, not memfit's."""
    trial, requests = SCRIPT.run(2, CAPACITY)
    settings = {variable: "backend:cudaMallocAsync"}
    assert Recording.of(trial, process_of(trial), requests, settings) is None
