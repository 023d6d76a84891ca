"""What every backend offers: the protocol that the search relies on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from memfit.cards import Gpu
from memfit.records import Capacity, Precision, Source, Trial
from memfit.step.workload import TrainingStep

__all__ = ["Backend", "Prediction", "SimulatedGpu", "predicted", "with_precision"]

_Returned = TypeVar("_Returned")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is known of a step on a device before it is tried there.

    Args:
        batch_size: The batch size at which memory is expected to run out next; `None` where it is
            not known.
        step: The step that was simulated.
        simulated: The simulation to show beside the trials; `None` where there is none, or where
            the trials are that simulation.
    """

    batch_size: int | None = None
    step: TrainingStep | None = None
    simulated: SimulatedGpu | None = None

    def trials_of(self, batch_sizes: Sequence[int]) -> tuple[Trial, ...]:
        """Return a simulated trial for each batch size, each once; nothing without a simulation."""
        if self.simulated is None or self.step is None:
            return ()
        return tuple(self.simulated.trial(self.step, size) for size in dict.fromkeys(batch_sizes))


class Backend(Protocol):
    """A device that training steps can be tried on.

    A backend is a context manager: leaving it gives everything back and puts the user's objects
    back as they were, however it is left.
    """

    @property
    def device_name(self) -> str:
        """What reports call the device."""
        ...

    @property
    def source(self) -> Source:
        """What its figures are: measured, rehearsed or simulated."""
        ...

    @property
    def auto_precision(self) -> Precision:
        """What `Precision.AUTO` means on this device."""
        ...

    @property
    def environment(self) -> tuple[str, ...]:
        """What trials ran with that a training script has to be given, as NAME=value."""
        ...

    @property
    def has_retries(self) -> bool:
        """Whether a step can fit only after the allocator gave back its cache and asked again."""
        ...

    def capacity(self) -> Capacity:
        """Return how many bytes a training step may use, and where that figure comes from."""
        ...

    def trial(self, step: TrainingStep, batch_size: int) -> Trial:
        """Try one batch size.

        Args:
            step: What to train; its precision is chosen.
            batch_size: Samples in each micro-batch, at least 1.

        Returns:
            How it ended. Out of memory is an outcome; any other error is raised as it came.
        """
        ...

    def needed_bytes(self, step: TrainingStep, batch_size: int) -> int | None:
        """Return the peak reserved bytes of a batch size that did not fit.

        Args:
            step: What to train.
            batch_size: A batch size that ran out.

        Returns:
            What it takes where there is more room than was allowed; `None` where there is not.
        """
        ...

    def call(
        self,
        function: Callable[..., _Returned],
        step: TrainingStep,
        *arguments: Any,
    ) -> _Returned:
        """Call a function where the device is, which may be in another process.

        Args:
            function: Called with the backend and the step first; found by its module and name.
            step: What to train; its precision is chosen.
            *arguments: What else the function takes.
        """
        ...

    def prediction(self, step: TrainingStep) -> Prediction:
        """Say where the edge of a step is expected, so that a search knows where to look.

        Args:
            step: What to train; its precision is chosen.
        """
        ...

    def simulated_counterpart(self) -> SimulatedGpu | None:
        """Return the simulation of this device, with the room that it has now.

        Returns:
            A simulated card; `None` where the device has no model.
        """
        ...

    def __enter__(self) -> Backend: ...

    def __exit__(self, *exc_info: object) -> None: ...


class SimulatedGpu(Backend, Protocol):
    """A backend that simulates a GPU."""

    @property
    def gpu(self) -> Gpu:
        """The card."""
        ...

    def expected_edge(self, step: TrainingStep) -> int | None:
        """Return a batch size that fits below one that does not.

        Args:
            step: What to train; its precision is chosen.

        Returns:
            Samples; `None` where the step does not grow, or nothing fits.
        """
        ...


def predicted(simulated: SimulatedGpu | None, step: TrainingStep) -> Prediction:
    """Return what the simulation of a device predicts for it.

    Args:
        simulated: The simulation; `None` where there is none.
        step: What to train; its precision is chosen.
    """
    if simulated is None:
        return Prediction()
    try:
        edge = simulated.expected_edge(step)
    except Exception:  # noqa: BLE001 - the user's own code, on tensors it was not written for
        # A step that cannot run without values has no prediction, and is tried all the same.
        return Prediction()
    return Prediction(batch_size=edge, step=step, simulated=simulated)


class HasPrecision(Protocol):
    """A place that says what `Precision.AUTO` means there."""

    @property
    def auto_precision(self) -> Precision:
        """What it means."""
        ...


def with_precision(step: TrainingStep, backend: HasPrecision) -> TrainingStep:
    """Return the step, its precision chosen by the device where it is left open.

    Args:
        step: What to train.
        backend: Where it will run.
    """
    if step.options.precision is not Precision.AUTO:
        return step
    options = dataclasses.replace(step.options, precision=backend.auto_precision)
    return dataclasses.replace(step, options=options)
