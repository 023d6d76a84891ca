"""The public functions: each wires a workload, a backend and what asks of them together.

No logic of its own: what is trained is `memfit.workload`'s, where it runs `memfit.backends`', which
batch size is `memfit.search`'s.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from memfit import equivalence, search
from memfit.backends import Backend, open_backend
from memfit.backends.cuda import CudaBackend
from memfit.backends.simulated import SimulatedBackend, TraceCache
from memfit.equivalence import AccumulationLoop
from memfit.errors import DoesNotFitError, UsageError
from memfit.records import (
    Equivalence,
    Precision,
    ProbeResult,
    StepOptions,
    Survey,
    SurveyAnswer,
    Trial,
)
from memfit.simulation.gpus import COMMON_GPUS, find_gpu, gpu_like
from memfit.units import format_bytes, parse_bytes, parse_image_size
from memfit.workload import TrainingStep, Workload

__all__ = ["estimate", "has_gpu", "probe", "survey", "verify"]

_DEFAULT_OPTIMIZER = "adamw"


def has_gpu() -> bool:
    """Whether this machine has a GPU that torch can train on."""
    return torch.cuda.is_available()


def probe(
    subject: str | Workload,
    *,
    device: str | None = None,
    gpu: str | None = None,
    memory: str | int | None = None,
    precision: str | Precision = "auto",
    optimizer: str = _DEFAULT_OPTIMIZER,
    image_size: int | str | tuple[int, int] | None = None,
    num_classes: int | None = None,
    channels_last: bool = False,
    grad_checkpointing: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    accumulate: bool = False,
    headroom: float = 0.05,
    multiple_of: int = 1,
    max_batch_size: int | None = None,
    progress: Callable[[Trial], None] | None = None,
) -> ProbeResult:
    """Find the largest batch size of a training step that fits a device, and prove it.

    The user's model, optimizer, gradients, random states and switches are as before when this
    returns, raises or is interrupted.

    Args:
        subject: A timm model's name, or a `Workload` of the user's own objects.
        device: `"cuda"`, `"cuda:1"` or `"cpu"`; by default a workload's own, and for a name the
            first GPU, or else the CPU.
        gpu: A card to simulate instead, by its name in the catalogue (`"rtx3090"`), or `"any"` with
            `memory`; nothing is measured then, and the result says so.
        memory: What the step may use: bytes, or text such as `"8GiB"`. On a GPU a cap on the
            caching allocator, on a CPU a limit beyond the loaded process. By default, all that is
            left. With `gpu` it is what the card has, in place of the catalogue's figure.
        precision: `"fp32"`, `"amp-bf16"`, `"amp-fp16"`, `"bf16"`, or `"auto"`: mixed precision on a
            GPU, `"fp32"` on a CPU.
        optimizer: A name that timm knows; a workload brings its own.
        image_size: Pixels, or height and width, for a timm model; by default its own.
        num_classes: Classes of a timm model; by default its own.
        channels_last: Train in `torch.channels_last`.
        grad_checkpointing: Recompute activations in backward, where the model can.
        model_kwargs: Further arguments for `timm.create_model`.
        accumulate: Probe the micro-batch of a step that accumulates gradients.
        headroom: Share of the capacity that the recommendation keeps free, from 0 to below 1.
        multiple_of: What the recommendation is a multiple of, at least 1.
        max_batch_size: Where the search ends; by default 65,536.
        progress: Called with each trial when it has ended.

    Returns:
        The largest batch size, the one to train with, and every trial.

    Raises:
        UsageError: Something asked for cannot be.
        DoesNotFitError: Not even the smallest batch fits.
        UnsupportedError: This system cannot run such a trial.
    """
    question = _Question.of(
        subject,
        precision=precision,
        optimizer=optimizer,
        image_size=image_size,
        num_classes=num_classes,
        channels_last=channels_last,
        grad_checkpointing=grad_checkpointing,
        model_kwargs=model_kwargs,
        accumulate=accumulate,
        headroom=headroom,
        multiple_of=multiple_of,
        max_batch_size=max_batch_size,
    )
    memory_bytes = None if memory is None else parse_bytes(memory)
    if gpu is not None:
        if device is not None:
            raise UsageError(f"Give a device ({device}) or a GPU to simulate ({gpu}), not both.")
        return _answer(question, _simulated(gpu, memory_bytes, TraceCache()), progress=progress)
    backend = open_backend(_device(subject, device), memory_bytes=memory_bytes, headroom=headroom)
    return _answer(question, backend, progress=progress)


def survey(
    subject: str | Workload,
    *,
    gpus: Sequence[str] | None = None,
    memory: str | int | None = None,
    precision: str | Precision = "auto",
    optimizer: str = _DEFAULT_OPTIMIZER,
    image_size: int | str | tuple[int, int] | None = None,
    num_classes: int | None = None,
    channels_last: bool = False,
    grad_checkpointing: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    accumulate: bool = False,
    headroom: float = 0.05,
    multiple_of: int = 1,
    max_batch_size: int | None = None,
) -> Survey:
    """Simulate a training step on several GPUs that are not there, from as few traces as can be.

    Args:
        subject: A timm model's name, or a `Workload`, which is not touched.
        gpus: Names of the catalogue; by default a short list of common cards.
        memory: What each card has, in place of the catalogue's figure.
        precision: As in `probe`; `"auto"` is each card's own.
        optimizer: As in `probe`.
        image_size: As in `probe`.
        num_classes: As in `probe`.
        channels_last: As in `probe`.
        grad_checkpointing: As in `probe`.
        model_kwargs: As in `probe`.
        accumulate: As in `probe`.
        headroom: As in `probe`.
        multiple_of: As in `probe`.
        max_batch_size: As in `probe`.

    Returns:
        An answer for each card, in the order of `gpus`.

    Raises:
        UsageError: Something asked for cannot be.
        UnsupportedError: The step cannot be traced without values.
    """
    question = _Question.of(
        subject,
        precision=precision,
        optimizer=optimizer,
        image_size=image_size,
        num_classes=num_classes,
        channels_last=channels_last,
        grad_checkpointing=grad_checkpointing,
        model_kwargs=model_kwargs,
        accumulate=accumulate,
        headroom=headroom,
        multiple_of=multiple_of,
        max_batch_size=max_batch_size,
    )
    memory_bytes = None if memory is None else parse_bytes(memory)
    traces = TraceCache()
    answers = []
    for backend in [_simulated(gpu, memory_bytes, traces) for gpu in gpus or COMMON_GPUS]:
        result = reason = None
        try:
            result = _answer(question, backend)
        except DoesNotFitError as error:
            reason = str(error)
        answers.append(SurveyAnswer(gpu=backend.device_name, result=result, reason=reason))
    return Survey(subject=question.name, answers=tuple(answers))


def estimate(
    subject: str | Workload,
    batch_size: int,
    *,
    gpu: str,
    memory: str | int | None = None,
    precision: str | Precision = "auto",
    optimizer: str = _DEFAULT_OPTIMIZER,
    image_size: int | str | tuple[int, int] | None = None,
    num_classes: int | None = None,
    channels_last: bool = False,
    grad_checkpointing: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    accumulate: bool = False,
) -> Trial:
    """Simulate one batch size of a training step on a GPU that is not there.

    Args:
        subject: A timm model's name, or a `Workload`, which is not touched.
        batch_size: Samples in each micro-batch, at least 1.
        gpu: A name of the catalogue, such as `"rtx3090"`; `"any"` with `memory` for a capacity
            alone.
        memory: What the card has, in place of the catalogue's figure.
        precision: As in `probe`.
        optimizer: As in `probe`.
        image_size: As in `probe`.
        num_classes: As in `probe`.
        channels_last: As in `probe`.
        grad_checkpointing: As in `probe`.
        model_kwargs: As in `probe`.
        accumulate: As in `probe`.

    Returns:
        How it would end; its `source` is `SIMULATED`.

    Raises:
        UsageError: Something asked for cannot be.
        UnsupportedError: The step cannot be traced without values.
    """
    if batch_size < 1:
        raise UsageError(f"The batch size must be at least 1, not {batch_size}.")
    question = _Question.of(
        subject,
        precision=precision,
        optimizer=optimizer,
        image_size=image_size,
        num_classes=num_classes,
        channels_last=channels_last,
        grad_checkpointing=grad_checkpointing,
        model_kwargs=model_kwargs,
        accumulate=accumulate,
    )
    memory_bytes = None if memory is None else parse_bytes(memory)
    backend = _simulated(gpu, memory_bytes, TraceCache())
    return backend.trial(question.step_on(backend), batch_size)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """What is asked of a device, checked."""

    subject: str | Workload
    options: StepOptions
    headroom: float
    multiple_of: int
    max_batch_size: int | None

    @classmethod
    def of(
        cls,
        subject: str | Workload,
        *,
        precision: str | Precision,
        optimizer: str,
        image_size: int | str | tuple[int, int] | None,
        num_classes: int | None,
        channels_last: bool,
        grad_checkpointing: bool,
        model_kwargs: Mapping[str, Any] | None,
        accumulate: bool,
        headroom: float = 0.0,
        multiple_of: int = 1,
        max_batch_size: int | None = None,
    ) -> _Question:
        _check(headroom=headroom, multiple_of=multiple_of, max_batch_size=max_batch_size)
        options = StepOptions(
            precision=_precision(precision),
            optimizer=_optimizer(subject, optimizer),
            image_size=None if image_size is None else parse_image_size(image_size),
            num_classes=num_classes,
            channels_last=channels_last,
            grad_checkpointing=grad_checkpointing,
            accumulate=accumulate,
            model_kwargs=tuple((model_kwargs or {}).items()),
        )
        TrainingStep(subject=subject, options=options)
        return cls(
            subject=subject,
            options=options,
            headroom=headroom,
            multiple_of=multiple_of,
            max_batch_size=max_batch_size,
        )

    @property
    def name(self) -> str:
        return self.subject if isinstance(self.subject, str) else self.subject.name

    def step_on(self, backend: Backend) -> TrainingStep:
        """Return the step, its precision chosen by the device where it is left open."""
        options = self.options
        if options.precision is Precision.AUTO:
            options = dataclasses.replace(options, precision=backend.auto_precision)
        return TrainingStep(subject=self.subject, options=options)


def _simulated(gpu: str, memory_bytes: int | None, traces: TraceCache) -> SimulatedBackend:
    return SimulatedBackend(find_gpu(gpu, total_bytes=memory_bytes), traces=traces)


def _answer(
    question: _Question, opened: Backend, *, progress: Callable[[Trial], None] | None = None
) -> ProbeResult:
    """Search on a backend, and close it."""
    start = time.perf_counter()
    with opened as backend:
        step = question.step_on(backend)
        trials: list[Trial] = []

        def trial(batch_size: int) -> Trial:
            trials.append(_tried(backend, step, batch_size, is_first=not trials))
            if progress is not None:
                progress(trials[-1])
            return trials[-1]

        capacity = backend.capacity()
        prediction = _Prediction.of(backend, step)
        found = search.largest(
            trial,
            capacity_bytes=capacity.usable_bytes,
            hint=prediction.batch_size,
            ceiling=question.max_batch_size or search.DEFAULT_CEILING,
            has_retries=backend.has_retries,
        )
        if found.batch_size is None:
            raise _does_not_fit(step, backend, found)
        stand = search.recommended(
            trial,
            found,
            capacity_bytes=capacity.usable_bytes,
            headroom=question.headroom,
            multiple_of=question.multiple_of,
            has_retries=backend.has_retries,
        )
        return ProbeResult(
            subject=step.name,
            device=backend.device_name,
            source=trials[-1].source,
            options=step.options,
            capacity=capacity,
            max_batch_size=found.batch_size,
            recommended_batch_size=stand.batch_size,
            proved=found.proved,
            headroom=question.headroom,
            multiple_of=question.multiple_of,
            trials=tuple(trials),
            environment=backend.environment,
            seconds=time.perf_counter() - start,
            torch_version=torch.__version__,
            predictions=prediction.of_trials(step, tuple(trials)),
        )


def verify(
    subject: str | Workload,
    *,
    micro_batch_size: int,
    accumulation_steps: int,
    device: str | None = None,
    precision: str | Precision = "auto",
    optimizer: str = _DEFAULT_OPTIMIZER,
    image_size: int | str | tuple[int, int] | None = None,
    num_classes: int | None = None,
    channels_last: bool = False,
    grad_checkpointing: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    samples: int | None = None,
    freeze_bn: bool = False,
    accumulate: AccumulationLoop | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Equivalence:
    """Prove that accumulated gradients equal the full batch's, or name what makes them differ.

    The user's model, optimizer, gradients, random states and switches are as before when this
    returns, raises or is interrupted.

    Args:
        subject: A timm model's name, or a `Workload` of the user's own objects.
        micro_batch_size: Samples in each micro-batch, at least 1.
        accumulation_steps: Micro-batches before each optimizer step, at least 2.
        device: Where training runs, as for `probe`; float64 is always checked on the CPU.
        precision: As for `probe`.
        optimizer: As for `probe`; gradients do not depend on it.
        image_size: As for `probe`.
        num_classes: As for `probe`.
        channels_last: As for `probe`.
        grad_checkpointing: As for `probe`.
        model_kwargs: As for `probe`.
        samples: The most samples that any comparison runs on; `None` for 8 in float64 and the
            whole effective batch in the precision of training.
        freeze_bn: Put the layers that are found to mix samples, and that stop when they are in
            evaluation mode, in that mode before gradients are compared.
        accumulate: The user's own accumulation loop, `loop(model, micro_batches, loss, optimizer)`,
            to be weighed as well: it runs each micro-batch through model and loss and steps the
            optimizer after each window, or leaves the sum in `.grad`.
        progress: Called with what runs next, the passes done and the passes in all.

    Returns:
        The verdict, every comparison, what mixes samples, and what the loop does wrong.

    Raises:
        UsageError: Something asked for cannot be.
        DoesNotFitError: Not even a micro-batch fits the device.
    """
    options = StepOptions(
        precision=_precision(precision),
        optimizer=_optimizer(subject, optimizer),
        image_size=None if image_size is None else parse_image_size(image_size),
        num_classes=num_classes,
        channels_last=channels_last,
        grad_checkpointing=grad_checkpointing,
        accumulate=True,
        model_kwargs=tuple((model_kwargs or {}).items()),
    )
    TrainingStep(subject=subject, options=options)
    wanted = _device(subject, device) or ("cuda" if has_gpu() else "cpu")
    # Gradients need no limit on a CPU's memory, so neither a system that can set one.
    auto = Precision.FP32 if wanted == "cpu" else open_backend(wanted).auto_precision
    if options.precision is Precision.AUTO:
        options = dataclasses.replace(options, precision=auto)
    return equivalence.verify(
        TrainingStep(subject=subject, options=options),
        torch.device(wanted),
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation_steps,
        samples=samples,
        freeze_bn=freeze_bn,
        accumulate=accumulate,
        progress=progress,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Prediction:
    """What the simulation says of a device: the search's hint, and what is shown beside trials."""

    batch_size: int | None = None
    simulated: SimulatedBackend | None = None

    @classmethod
    def of(cls, backend: Backend, step: TrainingStep) -> _Prediction:
        """Predict for a simulated card or a GPU that is there; for others there is no model."""
        if isinstance(backend, SimulatedBackend):
            return cls(backend.expected_edge(step))
        if not isinstance(backend, CudaBackend):
            return cls()
        capacity = backend.capacity()
        simulated = SimulatedBackend(
            gpu_like(backend.device_name, total_bytes=capacity.total_bytes),
            memory_bytes=capacity.usable_bytes,
        )
        try:
            return cls(simulated.expected_edge(step), simulated)
        except Exception:  # noqa: BLE001 - the user's own code, on tensors it was not written for
            # A step that cannot run without values has no prediction, and is measured all the same.
            return cls()

    def of_trials(self, step: TrainingStep, trials: tuple[Trial, ...]) -> tuple[Trial, ...]:
        if self.simulated is None:
            return ()
        sizes = dict.fromkeys(trial.batch_size for trial in trials)
        return tuple(self.simulated.trial(step, size) for size in sizes)


def _tried(backend: Backend, step: TrainingStep, batch_size: int, *, is_first: bool) -> Trial:
    try:
        return backend.trial(step, batch_size)
    except Exception as error:
        size = step.options.image_size
        if is_first and size is not None and getattr(error, "raised_in_step", False):
            raise UsageError(
                f"{step.name} cannot be trained on images of {size[0]}x{size[1]}: {error}"
            ) from error
        raise


def _check(*, headroom: float, multiple_of: int, max_batch_size: int | None) -> None:
    if not 0 <= headroom < 1:
        raise UsageError(f"The headroom must be at least 0 and below 1, not {headroom}.")
    if multiple_of < 1:
        raise UsageError(f"multiple_of must be at least 1, not {multiple_of}.")
    if max_batch_size is not None and max_batch_size < 1:
        raise UsageError(f"max_batch_size must be at least 1, not {max_batch_size}.")


def _precision(precision: str | Precision) -> Precision:
    try:
        return Precision(precision)
    except ValueError:
        known = ", ".join(choice.value for choice in Precision)
        raise UsageError(f"There is no precision {precision!r}; choose one of {known}.") from None


def _optimizer(subject: str | Workload, optimizer: str) -> str | None:
    if isinstance(subject, str):
        return optimizer
    if optimizer != _DEFAULT_OPTIMIZER:
        raise UsageError(f"A workload brings its own optimizer; {optimizer!r} was given beside it.")
    return subject.optimizer if isinstance(subject.optimizer, str) else None


def _device(subject: str | Workload, device: str | None) -> str | None:
    if isinstance(subject, str):
        return device
    own = subject.device
    if device is not None and torch.device(device).type != own.type:
        raise UsageError(
            f"The model is on {own}, and the trials were asked for on {device}: move the model "
            "first, and make the optimizer after that."
        )
    return device or str(own)


def _does_not_fit(step: TrainingStep, backend: Backend, found: search.Found) -> DoesNotFitError:
    capacity = backend.capacity()
    smallest = min(found.trials, key=lambda trial: trial.batch_size)
    needed = backend.needed_bytes(step, smallest.batch_size)
    what = (
        f"it needs {format_bytes(needed)}"
        if needed is not None
        else f"it ran out at {format_bytes(smallest.peak_reserved_bytes or 0)}"
    )
    return DoesNotFitError(
        f"{step.name} does not fit even at batch size {smallest.batch_size}: {what}, and "
        f"{format_bytes(capacity.usable_bytes)} are available ({capacity.origin})."
    )
