"""The protocol of all backends, which the search uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from memfit.cards import Gpu
from memfit.records import Capacity, Precision, Source, Trial
from memfit.step.training_step import TrainingStep

__all__ = ["Backend", "Prediction", "SimulatedGpu", "predicted", "with_precision"]

_Returned = TypeVar("_Returned")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What is known about a step on a device before its first trial.

    Args:
        batch_size: The largest batch size that is expected to fit; `None` if it is not known.
        step: The step that was simulated.
        simulated: The simulation to show beside the trials; `None` if there is none, or if the
            trials themselves are this simulation.
        scout: A quicker and rougher simulation, which says where to begin; `None` if there is none.
    """

    batch_size: int | None = None
    step: TrainingStep | None = None
    simulated: SimulatedGpu | None = None
    scout: SimulatedGpu | None = None

    def trials_of(self, batch_sizes: Sequence[int]) -> tuple[Trial, ...]:
        """Return one simulated trial for each different batch size.

        Without a simulation, the result is empty.
        """
        if self.simulated is None or self.step is None:
            return ()
        return tuple(self.simulated.trial(self.step, size) for size in dict.fromkeys(batch_sizes))


class Backend(Protocol):
    """A device that training steps can be tried on.

    A backend is a context manager. At the end of the block, also after an error, it releases all
    memory and puts the user's objects back as they were.
    """

    @property
    def device_name(self) -> str:
        """The name of the device in reports."""
        ...

    @property
    def source(self) -> Source:
        """Whether its figures are measured, rehearsed or simulated."""
        ...

    @property
    def auto_precision(self) -> Precision:
        """The precision that `Precision.AUTO` stands for on this device."""
        ...

    @property
    def environment(self) -> tuple[str, ...]:
        """Environment variables that a training script needs too, as NAME=value."""
        ...

    @property
    def has_retries(self) -> bool:
        """Whether the allocator gives back its cache and retries when memory is short."""
        ...

    @property
    def takes_ranks(self) -> bool:
        """Whether a trial can be one rank of many (`StepOptions.parallel`)."""
        ...

    def capacity(self) -> Capacity:
        """Return how many bytes a training step may use, and the source of that figure."""
        ...

    def trial(self, step: TrainingStep, batch_size: int) -> Trial:
        """Try one batch size.

        Args:
            step: The step to train. Its precision is chosen.
            batch_size: Samples in each micro-batch, at least 1.

        Returns:
            The result of the trial. Out of memory is an outcome. Any other error is raised
            unchanged.
        """
        ...

    def needed_bytes(self, step: TrainingStep, batch_size: int) -> int | None:
        """Return the peak reserved bytes of a batch size that did not fit.

        Args:
            step: The step to train.
            batch_size: A batch size that ran out of memory.

        Returns:
            The bytes, if the device has more memory than the trial was allowed to use; `None`
            otherwise.
        """
        ...

    def call(
        self,
        function: Callable[..., _Returned],
        step: TrainingStep,
        *arguments: Any,
    ) -> _Returned:
        """Call a function in the process that uses the device, which may be another process.

        Args:
            function: A function at module level. Its first arguments are the backend and the step.
            step: The step to train. Its precision is chosen.
            *arguments: The other arguments of the function.
        """
        ...

    def prediction(self, step: TrainingStep) -> Prediction:
        """Return the batch size that is expected to fit, so that a search can start near it.

        Args:
            step: The step to train. Its precision is chosen.
        """
        ...

    def simulated_counterpart(self) -> SimulatedGpu | None:
        """Return the simulation of this device, with the memory that it has now.

        Returns:
            A simulated card; `None` if memfit has no model of the device.
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
        """Return a batch size that fits and that is one less than a size that does not fit.

        Args:
            step: The step to train. Its precision is chosen.

        Returns:
            The batch size; `None` if the step's memory does not grow, or if no size fits.
        """
        ...

    def scout(self) -> SimulatedGpu:
        """Return a rougher and quicker simulation of the same card."""
        ...


def predicted(simulated: SimulatedGpu | None, step: TrainingStep) -> Prediction:
    """Return the prediction of a device's simulation.

    Args:
        simulated: The simulation; `None` if there is none.
        step: The step to train. Its precision is chosen.
    """
    if simulated is None:
        return Prediction()
    is_other = step.options.compile or step.options.parallel is not None
    if is_other:
        # The plain step of a process alone says where to begin. It is no prediction to show.
        plain = dataclasses.replace(step.options, compile=False, parallel=None, world_size=1)
        step = dataclasses.replace(step, options=plain)
    try:
        edge = simulated.expected_edge(step)
    except Exception:  # noqa: BLE001 - the user's own code, on tensors it was not written for
        # A step that cannot run without values gets no prediction, but its trials still run.
        return Prediction()
    return Prediction(
        batch_size=edge,
        step=step,
        simulated=None if is_other else simulated,
        scout=simulated.scout(),
    )


class HasPrecision(Protocol):
    """A device or backend that says which precision `Precision.AUTO` stands for."""

    @property
    def auto_precision(self) -> Precision:
        """The precision."""
        ...


def with_precision(step: TrainingStep, backend: HasPrecision) -> TrainingStep:
    """Return the step with a chosen precision. The device chooses it if the user did not.

    Args:
        step: The step to train.
        backend: The backend that it will run on.
    """
    if step.options.precision is not Precision.AUTO:
        return step
    options = dataclasses.replace(step.options, precision=backend.auto_precision)
    return dataclasses.replace(step, options=options)
