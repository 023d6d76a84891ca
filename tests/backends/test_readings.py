"""Tests of when a trial has run long enough."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import torch
from torch import nn

from memfit import Workload
from memfit.backends.readings import Reading, steady_readings
from memfit.records import Precision, StepOptions
from memfit.step.runner import PreparedStep
from memfit.step.training_step import TrainingStep

MIB = 2**20


def adam_step() -> PreparedStep:
    workload = Workload(
        nn.Linear(100, 100), torch.ones(1, 100), lambda out: out.sum(), torch.optim.Adam
    )
    step = TrainingStep(subject=workload, options=StepOptions(precision=Precision.FP32))
    prepared = step.prepare(torch.device("cpu"))
    prepared.begin()
    return prepared


def peaks(*reserved: float) -> Callable[[Callable[[], None]], Reading]:
    """Return a measurement that gives these peaks one after another, and then always the last."""

    def endless() -> Iterable[float]:
        yield from reserved
        while True:
            yield reserved[-1]

    rest = iter(endless())

    def measured(iterate: Callable[[], None]) -> Reading:
        iterate()
        return Reading(
            reserved_bytes=int(next(rest)), allocated_bytes=0, requested_bytes=None, seconds=1.0
        )

    return measured


def test_two_equal_peaks_are_enough() -> None:
    """A step that needs the same memory twice has settled."""
    readings, grows = steady_readings(adam_step(), 1, peaks(MIB))
    assert (len(readings), grows) == (2, False)


def test_growth_by_the_optimizer_state_is_expected() -> None:
    """The first step makes the state, so the second peak is higher by the state."""
    state_bytes = 2 * (100 * 100 + 100) * 4
    readings, grows = steady_readings(adam_step(), 1, peaks(MIB, MIB + state_bytes))
    assert (len(readings), grows) == (2, False)


def test_growth_beyond_the_state_is_followed_until_it_ends() -> None:
    """The last two peaks have to agree."""
    readings, grows = steady_readings(adam_step(), 1, peaks(MIB, 2 * MIB, 3 * MIB))
    assert (len(readings), grows) == (4, False)


def test_a_peak_that_never_settles_is_reported() -> None:
    """A step that leaks grows until the end."""
    readings, grows = steady_readings(adam_step(), 1, peaks(*(2**i * MIB for i in range(20))))
    assert grows
    assert len(readings) == 6


class SkipsLayers(nn.Module):
    """Runs each of its layers with a probability of one half."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(30))
        self.depths: list[int] = []

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        data = data + self.layers[0](data)
        self.depths.append(0)
        for layer in self.layers:
            if random.random() >= 0.5:  # noqa: S311 - as models do
                data = layer(data)
                self.depths[-1] += 1
        return data


def test_a_step_that_draws_its_depth_is_run_at_its_deepest() -> None:
    """Which end is deepest is unknown, so both are tried; the peak is said to vary."""
    model = SkipsLayers()
    workload = Workload(model, torch.ones(1, 4), lambda out: out.sum(), torch.optim.SGD)
    step = TrainingStep(subject=workload, options=StepOptions(precision=Precision.FP32))
    prepared = step.prepare(torch.device("cpu"))
    prepared.begin()

    def measured(iterate: Callable[[], None]) -> Reading:
        iterate()
        deepest = max(model.depths)
        return Reading(
            reserved_bytes=MIB * deepest, allocated_bytes=0, requested_bytes=None, seconds=1.0
        )

    readings, grows = steady_readings(prepared, 1, measured)
    assert model.depths[1:] == [0, 30, 30]
    assert max(reading.reserved_bytes for reading in readings) == 30 * MIB
    assert prepared.peak_varies
    assert not grows


def counted(*calls: int) -> Callable[[Callable[[], None]], Reading]:
    """Return a measurement of one peak that counts these calls of the device, one after another."""
    rest = iter(calls)

    def measured(iterate: Callable[[], None]) -> Reading:
        iterate()
        return Reading(
            reserved_bytes=MIB,
            allocated_bytes=0,
            requested_bytes=None,
            seconds=1.0,
            num_device_calls=next(rest),
        )

    return measured


def test_an_iteration_that_calls_the_device_is_followed_by_another() -> None:
    """Fragments may still move, and the next iteration may run out."""
    readings, grows = steady_readings(adam_step(), 1, counted(5, 5))
    assert (len(readings), grows) == (2, False)
    readings, grows = steady_readings(adam_step(), 1, counted(5, 7, 7))
    assert (len(readings), grows) == (3, False)
    # Two peaks that are the same to the byte end it, whatever was called.
    readings, grows = steady_readings(adam_step(), 1, counted(5, 7, 9))
    assert (len(readings), grows) == (3, False)
