"""Trials on a rehearsed card: the CUDA backend, in a process whose device computes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from memfit.backends.card_capacity import card_capacity
from memfit.backends.crossing import ChildTraceback
from memfit.backends.protocol import Prediction, SimulatedGpu, predicted
from memfit.backends.rehearsed.parcel import packed
from memfit.backends.rehearsed.processes import ServerProcess, new_process, taken
from memfit.backends.rehearsed.server import Answer, Call, End, Open
from memfit.cards import Gpu
from memfit.errors import StepCrashedError
from memfit.memory.switches import switches
from memfit.records import Capacity, Precision, Source, Trial
from memfit.step.training_step import TrainingStep
from memfit.units import TIB

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["RehearsalServers", "RehearsedBackend"]

_Returned = TypeVar("_Returned")
# SIGKILL's exit code, as a shell and as Python give it.
_KILLED = (128 + signal.SIGKILL, -signal.SIGKILL)
# What a card has that shows what a step needs: more than any step.
_ROOMY_BYTES = 4 * TIB


class RehearsalServers:
    """The processes that rehearse, shared by the cards of one question: there is one.

    Args:
        environment: From a card to the variables that make a process rehearse it.
    """

    def __init__(self, environment: Callable[[Gpu], Mapping[str, str]]) -> None:
        self._environment = environment
        self._server: ServerProcess | None = None
        self._is_serving = False
        self._steps: list[TrainingStep] = []
        self._parcels: set[int] = set()

    def __enter__(self) -> Self:
        """Return the servers; a process starts with the first card."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End the process."""
        server = self._server
        self._server = None
        if server is not None and (self._is_serving or not taken(server)):
            server.end()

    def start(self, card: Gpu) -> None:
        """Start the process, so that it is ready when the first card is asked for.

        Raises:
            UnsupportedError: This system cannot rehearse the card.
        """
        if self._server is None:
            self._server = new_process(self._environment(card))

    def open(self, card: Gpu, *, memory_bytes: int | None = None) -> None:
        """Have a fresh process serve a card."""
        self.start(card)
        self._parcels.clear()
        self._is_serving = True
        self._send(
            Open(
                environment=self._environment(card),
                memory_bytes=memory_bytes,
                search_path=tuple(sys.path),
                switches=switches(),
            )
        )

    def call(self, function: str, step: TrainingStep | None = None, *arguments: Any) -> Any:
        """Call a function in the process that serves the card.

        Args:
            function: `"package.module:name"`; it gets the CUDA backend, and the step if there is
                one.
            step: The step.
            *arguments: What else the function takes.

        Returns:
            What it returned.

        Raises:
            StepCrashedError: The process died.
        """
        number, parcel = self._parcel_of(step)
        self._send(Call(function=function, step=number, parcel=parcel, arguments=arguments))
        answer = self._receive()
        if answer.error is not None:
            answer.error.__cause__ = ChildTraceback(answer.where)
            raise answer.error
        return answer.value

    def close(self) -> None:
        """End the process that serves the card."""
        if self._server is None:
            return
        with contextlib.suppress(StepCrashedError):
            self._send(End())
            self._receive()
            self._is_serving = False

    def _parcel_of(self, step: TrainingStep | None) -> tuple[int | None, bytes | None]:
        if step is None:
            return None, None
        known = (number for number, other in enumerate(self._steps) if other is step)
        number = next(known, None)
        if number is None:
            self._steps.append(step)
            number = len(self._steps) - 1
        if number in self._parcels:
            return number, None
        parcel = packed(step)
        # The other side keeps one step at a time.
        self._parcels = {number}
        return number, parcel

    def _send(self, request: Open | Call | End) -> None:
        assert self._server is not None
        try:
            self._server.connection.send(request)
        except (OSError, EOFError) as error:
            raise self._died() from error

    def _receive(self) -> Answer:
        assert self._server is not None
        try:
            answer = self._server.connection.recv()
        except (OSError, EOFError) as error:
            raise self._died() from error
        assert isinstance(answer, Answer)
        return answer

    def _died(self) -> StepCrashedError:
        server, self._server = self._server, None
        code = None if server is None else server.end()
        with_code = f" with code {code}" if code else ""
        killed = " Something killed it, as a system does whose memory is full."
        return StepCrashedError(
            f"The process that rehearses the step ended in the middle of it{with_code}."
            + (killed if code in _KILLED else "")
        )


class RehearsedBackend:
    """A card of the catalogue, rehearsed.

    Args:
        card: The card.
        servers: The processes that rehearse.
        counterpart: The simulation of the card, for predictions; `None` for none.
    """

    def __init__(
        self, card: Gpu, servers: RehearsalServers, *, counterpart: SimulatedGpu | None = None
    ) -> None:
        self._card = card
        self._servers = servers
        self._counterpart = counterpart
        self._is_open = False
        self._has_tried = False
        self._capacity: Capacity | None = None
        servers.start(card)

    @property
    def gpu(self) -> Gpu:
        """The card."""
        return self._card

    @property
    def device_name(self) -> str:
        """The card's name."""
        return self._card.name

    @property
    def source(self) -> Source:
        """What its figures are."""
        return Source.REHEARSED

    @property
    def auto_precision(self) -> Precision:
        """bf16 autocast where the card has it, else fp16."""
        return Precision.AMP_BF16 if self._card.has_bf16 else Precision.AMP_FP16

    @property
    def environment(self) -> tuple[str, ...]:
        """What a training script has to be given: nothing."""
        return ()

    @property
    def has_retries(self) -> bool:
        """Whether a step can fit only after the allocator gave back its cache and asked again."""
        return True

    @property
    def takes_ranks(self) -> bool:
        """Whether a trial can be one rank of many."""
        return True

    def capacity(self) -> Capacity:
        """Return what the caching allocator could take of the card."""
        if self._capacity is None:
            there: Capacity = self._call(_path_of(capacity_of))
            of_card = card_capacity(self._card, self.source)
            self._capacity = dataclasses.replace(
                there,
                origin=of_card.origin,
                other_processes=(),
                cautious_bytes=of_card.cautious_bytes,
            )
        return self._capacity

    def trial(self, step: TrainingStep, batch_size: int) -> Trial:
        """Try one batch size on the rehearsed card, in a process in which nothing was tried before.

        A script begins in such a process. After another trial, autocast frees its copies of weights
        in another order, and near the edge that decides. A compiled step keeps its process, because
        there it is compiled.

        Args:
            step: What to train; its precision is chosen.
            batch_size: Samples in each micro-batch, at least 1.

        Returns:
            How it ended, in the caching allocator's own figures.
        """
        if self._has_tried and not step.options.compile:
            self._close()
        self._open()
        self._has_tried = True
        trial: Trial = self._call(_path_of(trial_of), step, batch_size)
        return trial

    def call(
        self, function: Callable[..., _Returned], step: TrainingStep, *arguments: Any
    ) -> _Returned:
        """Call a function with the card's CUDA backend, in its process; see `Backend.call`."""
        returned: _Returned = self._call(_path_of(function), step, *arguments)
        return returned

    def needed_bytes(self, step: TrainingStep, batch_size: int) -> int | None:
        """Return what a batch size takes on a card with more room than it needs."""
        self._close()
        roomy = dataclasses.replace(self._card, total_bytes=_ROOMY_BYTES)
        self._servers.open(roomy)
        try:
            trial: Trial = self._servers.call(_path_of(trial_of), step, batch_size)
        finally:
            self._servers.close()
        return trial.peak_reserved_bytes if trial.fits else None

    def prediction(self, step: TrainingStep) -> Prediction:
        """Simulate where the edge of a step is.

        Args:
            step: What to train; its precision is chosen.
        """
        return predicted(self.simulated_counterpart(), step)

    def simulated_counterpart(self) -> SimulatedGpu | None:
        """Return the simulation of this card."""
        return self._counterpart

    def __enter__(self) -> RehearsedBackend:
        """Return the backend. The card's process already starts CUDA."""
        self._open()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End the card's process."""
        self._close()

    def _call(self, function: str, step: TrainingStep | None = None, *arguments: Any) -> Any:
        self._open()
        return self._servers.call(function, step, *arguments)

    def _open(self) -> None:
        if not self._is_open:
            self._servers.open(self._card)
            self._is_open, self._has_tried = True, False

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._servers.close()


def _path_of(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__name__}"


# --- called on the other side -------------------------------------------------------------------


def capacity_of(backend: Any) -> Capacity:
    """Return a backend's capacity."""
    capacity: Capacity = backend.capacity()
    return capacity


def trial_of(backend: Any, step: TrainingStep, batch_size: int) -> Trial:
    """Try a batch size on a backend."""
    trial: Trial = backend.trial(step, batch_size)
    return trial
