"""`plan` and `survey_plans`: from a target batch size to micro-batches that fit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch
from typing_extensions import Unpack

from memfit import planning, search
from memfit.accumulation import Plan
from memfit.api.probing import simulated
from memfit.api.searching import Question, check_bounds, searched, tried
from memfit.api.steps import StepKeywords, describe, own_device, step_on
from memfit.backends import Backend, open_backend
from memfit.backends.simulated import TraceCache
from memfit.errors import DoesNotFitError, UsageError
from memfit.records import Objective, PlanAnswer, PlanSurvey, ProbeResult, Trial
from memfit.simulation.gpus import COMMON_GPUS
from memfit.units import parse_bytes
from memfit.workload import TrainingStep, Workload

__all__ = ["Target", "plan", "plan_on", "survey_plans"]

_NO_SECONDS = (
    "What is fastest is measured, and a simulation has no seconds: leave the GPU's name out and "
    "plan on the device that is there, or plan for the largest micro-batch."
)


def plan(
    subject: str | Workload,
    effective_batch_size: int,
    *,
    world_size: int = 1,
    objective: str | Objective = Objective.LARGEST,
    device: str | None = None,
    gpu: str | None = None,
    memory: str | int | None = None,
    headroom: float = 0.05,
    multiple_of: int = 1,
    max_batch_size: int | None = None,
    progress: Callable[[Trial], None] | None = None,
    **options: Unpack[StepKeywords],
) -> Plan:
    """Turn an effective batch size into micro-batches that fit, exactly.

    Where one rank's share fits whole, there is one step, and where half of it fits beside the
    gradients, two. Otherwise the largest micro-batch of a step that accumulates is looked for. The
    plan's own micro-batch is among the trials.

    Args:
        subject: A timm model's name, or a `Workload` of the user's own objects.
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: Ranks that share them, each on such a device.
        objective: `"largest"` for the fewest steps, `"fastest"` for the most samples per second as
            measured, `"even"` for equal parts only.
        device: As in `probe`.
        gpu: As in `probe`.
        memory: As in `probe`.
        headroom: Share of the capacity to keep free, from 0 to below 1.
        multiple_of: What micro-batches are multiples of, the last of a step excepted.
        max_batch_size: The largest micro-batch of interest.
        progress: Called with each trial when it has ended.
        **options: As in `probe`.

    Returns:
        The plan, to look at or to give to `Accumulator`.

    Raises:
        UsageError: Something asked for cannot be.
        DoesNotFitError: Not even the smallest micro-batch fits with the headroom.
        UnsupportedError: This system cannot run such a trial.
    """
    target = Target.of(
        effective_batch_size,
        world_size=world_size,
        objective=objective,
        headroom=headroom,
        multiple_of=multiple_of,
        max_batch_size=max_batch_size,
    )
    step = describe(subject, **options)
    memory_bytes = None if memory is None else parse_bytes(memory)
    if gpu is None:
        backend = open_backend(
            own_device(subject, device), memory_bytes=memory_bytes, headroom=headroom
        )
        return plan_on(backend, step, target, progress=progress)
    if device is not None:
        raise UsageError(f"Give a device ({device}) or a GPU to simulate ({gpu}), not both.")
    if target.objective is Objective.FASTEST:
        raise UsageError(_NO_SECONDS)
    return plan_on(simulated(gpu, memory_bytes, TraceCache()), step, target, progress=progress)


def survey_plans(
    subject: str | Workload,
    effective_batch_size: int,
    *,
    gpus: Sequence[str] | None = None,
    world_size: int = 1,
    objective: str | Objective = Objective.LARGEST,
    memory: str | int | None = None,
    headroom: float = 0.05,
    multiple_of: int = 1,
    max_batch_size: int | None = None,
    **options: Unpack[StepKeywords],
) -> PlanSurvey:
    """Plan for several GPUs that are not there, from as few traces as can be.

    Args:
        subject: A timm model's name, or a `Workload`, which is not touched.
        effective_batch_size: As in `plan`.
        gpus: Names of the catalogue; by default a short list of common cards.
        world_size: As in `plan`.
        objective: As in `plan`, but for `"fastest"`.
        memory: What each card has, in place of the catalogue's figure.
        headroom: As in `plan`.
        multiple_of: As in `plan`.
        max_batch_size: As in `plan`.
        **options: As in `probe`; a precision of `"auto"` is each card's own.

    Returns:
        An answer for each card, in the order of `gpus`.

    Raises:
        UsageError: Something asked for cannot be.
        UnsupportedError: The step cannot be traced without values.
    """
    target = Target.of(
        effective_batch_size,
        world_size=world_size,
        objective=objective,
        headroom=headroom,
        multiple_of=multiple_of,
        max_batch_size=max_batch_size,
    )
    if target.objective is Objective.FASTEST:
        raise UsageError(_NO_SECONDS)
    step = describe(subject, **options)
    memory_bytes = None if memory is None else parse_bytes(memory)
    traces = TraceCache()
    answers = []
    for backend in [simulated(gpu, memory_bytes, traces) for gpu in gpus or COMMON_GPUS]:
        found = reason = None
        try:
            found = plan_on(backend, step, target)
        except DoesNotFitError as error:
            reason = str(error)
        answers.append(PlanAnswer(gpu=backend.device_name, plan=found, reason=reason))
    return PlanSurvey(
        subject=step.name,
        effective_batch_size=target.effective_batch_size,
        world_size=target.world_size,
        answers=tuple(answers),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is planned for, checked.

    Args:
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: Ranks that share them.
        objective: What the plan aims at.
        headroom: Share of the capacity to keep free.
        multiple_of: What micro-batches are multiples of, the last of a step excepted.
        max_batch_size: The largest micro-batch of interest; `None` for any.
    """

    effective_batch_size: int
    world_size: int
    objective: Objective
    headroom: float
    multiple_of: int
    max_batch_size: int | None

    @classmethod
    def of(
        cls,
        effective_batch_size: object,
        *,
        world_size: object,
        objective: str | Objective,
        headroom: float,
        multiple_of: int,
        max_batch_size: int | None,
    ) -> Target:
        """Check what was asked for.

        Raises:
            UsageError: Something asked for cannot be.
        """
        samples, ranks = planning.check_target(effective_batch_size, world_size)
        check_bounds(headroom=headroom, multiple_of=multiple_of, max_batch_size=max_batch_size)
        known = [choice.value for choice in Objective]
        if objective not in known:
            raise UsageError(
                f"There is no objective {objective!r}; choose one of {', '.join(known)}."
            )
        return cls(
            effective_batch_size=samples,
            world_size=ranks,
            objective=Objective(objective),
            headroom=headroom,
            multiple_of=multiple_of,
            max_batch_size=max_batch_size,
        )

    @property
    def share(self) -> int:
        """The samples that the first rank takes."""
        return planning.share_of(self.effective_batch_size, self.world_size)

    def part_of(self, num_steps: int) -> int:
        """Return the most samples in a micro-batch of so many steps or more."""
        part = -(-self.share // num_steps)
        rounded = -(-part // self.multiple_of) * self.multiple_of
        # Rounded up to the whole share, it would be no part.
        part = rounded if rounded < self.share else part
        return min(part, self.max_batch_size or part)

    def question(self, step: TrainingStep) -> Question:
        """Return what is asked of a device where two steps are too few."""
        return Question(
            step=step,
            headroom=self.headroom,
            multiple_of=self.multiple_of,
            max_batch_size=self.part_of(3),
        )


def plan_on(
    opened: Backend,
    step: TrainingStep,
    target: Target,
    *,
    progress: Callable[[Trial], None] | None = None,
) -> Plan:
    """Plan on a backend, and close it.

    Args:
        opened: Where trials run.
        step: What to train; its precision may be left open.
        target: What to plan for.
        progress: Called with each trial when it has ended.

    Raises:
        UsageError: The target has no such plan.
        DoesNotFitError: Not even the smallest micro-batch fits with the headroom.
    """
    accumulating = dataclasses.replace(
        step, options=dataclasses.replace(step.options, accumulate=True)
    )
    question = target.question(accumulating)
    with opened as backend:
        return _Planner(backend, step, question, target, progress).plan()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Limits:
    """The largest micro-batch that fits, and that keeps the headroom; `proved` if none larger."""

    largest: int
    recommended: int
    proved: bool


class _Planner:
    """A plan that is being made on one device."""

    def __init__(
        self,
        backend: Backend,
        step: TrainingStep,
        question: Question,
        target: Target,
        progress: Callable[[Trial], None] | None,
    ) -> None:
        self._start = time.perf_counter()
        self._backend = backend
        self._whole_step = step_on(step, backend)
        self._step = step_on(question.step, backend)
        self._question = dataclasses.replace(question, step=self._step)
        self._target = target
        self._progress = progress
        self._trials: list[Trial] = []
        self._capacity = backend.capacity()
        self._limit_bytes = search.limit_of(self._capacity.usable_bytes, target.headroom)

    def plan(self) -> Plan:
        target, share = self._target, self._target.share
        is_timed = target.objective is Objective.FASTEST
        remarks: list[str] = []
        if self._fits_whole(remarks):
            limits = _Limits(largest=share, recommended=share, proved=False)
            largest = self._timed(share // 2) if is_timed else 0
        else:
            limits = self._limits()
            largest = self._timed(limits.recommended) if is_timed else limits.recommended
        whole = limits.recommended if limits.recommended == share else 0
        while whole or largest:
            parts = self._parts(whole, largest)
            size, step = parts.sizes[0], self._whole_step if len(parts.sizes) == 1 else self._step
            trial = self._known(step, size) or self._tried(step, size)
            if search.is_comfortable(trial, self._limit_bytes):
                return self._made(step, trial, parts, limits, tuple(remarks))
            # Fits need not be monotone: the plan's own micro-batch has to be one that was seen to.
            largest = size - 1
        raise DoesNotFitError(
            f"{self._step.name} fits in micro-batches larger than the plan's and not in those: its "
            "memory is not steady enough to plan with."
        )

    def _fits_whole(self, remarks: list[str]) -> bool:
        """Whether a share fits in one step, with the headroom."""
        target, share = self._target, self._target.share
        if share > (target.max_batch_size or share):
            return False
        trial = self._tried(self._whole_step, share)
        if search.is_comfortable(trial, self._limit_bytes):
            return True
        if trial.fits:
            remarks.append(
                f"{share} samples do fit in one step, but leave less than {target.headroom:.0%} "
                "free or need allocator retries."
            )
        return False

    def _limits(self) -> _Limits:
        """Find the largest micro-batch of a step that accumulates."""
        half = self._target.part_of(2)
        trial = self._tried(self._step, half)
        if search.is_comfortable(trial, self._limit_bytes):
            return _Limits(largest=half, recommended=half, proved=False)
        result = searched(self._question, self._backend, progress=self._noted)
        return _Limits(
            largest=result.max_batch_size,
            recommended=self._recommended(result),
            proved=result.proved,
        )

    def _recommended(self, result: ProbeResult) -> int:
        """Return the largest micro-batch that keeps the headroom."""
        target, largest = self._target, result.recommended_batch_size
        if largest is None:
            unit = f" that is a multiple of {target.multiple_of}" if target.multiple_of > 1 else ""
            raise DoesNotFitError(
                f"{self._step.name} fits, but no micro-batch{unit} leaves {target.headroom:.0%} of "
                "the memory free without allocator retries: the largest that fits at all is "
                f"{result.max_batch_size}; ask for less headroom."
            )
        return largest

    def _parts(self, largest_whole: int, largest_accumulating: int) -> planning.Parts:
        target = self._target
        return planning.split(
            target.effective_batch_size,
            world_size=target.world_size,
            largest_whole=largest_whole,
            largest_accumulating=largest_accumulating,
            objective=target.objective,
            multiple_of=target.multiple_of,
            speeds=self._speeds(),
        )

    def _speeds(self) -> list[planning.Speed]:
        return [
            planning.Speed(batch_size=trial.batch_size, samples_per_second=trial.samples_per_second)
            for trial in self._trials
            if trial.samples_per_second is not None
            and search.is_comfortable(trial, self._limit_bytes)
        ]

    def _timed(self, largest: int) -> int:
        """Try micro-batches whose speed is to be known; return the largest that fits well."""
        sizes = planning.sizes_to_time(largest, multiple_of=self._target.multiple_of)
        trials = [self._known(self._step, size) or self._tried(self._step, size) for size in sizes]
        fitting = [t.batch_size for t in trials if search.is_comfortable(t, self._limit_bytes)]
        return max(fitting, default=0)

    def _known(self, step: TrainingStep, batch_size: int) -> Trial | None:
        tried_before = (
            trial
            for trial in reversed(self._trials)
            if (trial.batch_size, trial.num_micro_batches) == (batch_size, step.num_micro_batches)
        )
        return next(tried_before, None)

    def _tried(self, step: TrainingStep, batch_size: int) -> Trial:
        trial = tried(self._backend, step, batch_size, is_first=not self._trials)
        self._noted(trial)
        return trial

    def _noted(self, trial: Trial) -> None:
        self._trials.append(trial)
        if self._progress is not None:
            self._progress(trial)

    def _made(
        self,
        step: TrainingStep,
        trial: Trial,
        parts: planning.Parts,
        limits: _Limits,
        remarks: tuple[str, ...],
    ) -> Plan:
        target = self._target
        return Plan(
            subject=step.name,
            device=self._backend.device_name,
            source=trial.source,
            options=step.options,
            capacity=self._capacity,
            effective_batch_size=target.effective_batch_size,
            world_size=target.world_size,
            objective=target.objective,
            micro_batch_sizes=parts.sizes,
            multiple_of=target.multiple_of,
            headroom=target.headroom,
            max_micro_batch_size=limits.largest,
            proved=limits.proved,
            recommended_micro_batch_size=limits.recommended,
            peak_reserved_bytes=trial.peak_reserved_bytes,
            samples_per_second=parts.samples_per_second,
            trials=tuple(self._trials),
            environment=self._backend.environment,
            remarks=(*remarks, *parts.remarks),
            seconds=time.perf_counter() - self._start,
            torch_version=torch.__version__,
        )
