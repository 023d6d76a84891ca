"""Checks of the arguments of `Accumulator`, before training begins."""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import nn
from torch.optim import Optimizer

from memfit.accumulation.ranks import Ranks
from memfit.errors import UsageError
from memfit.records import Plan, PlanSurvey, Precision, StepOptions
from memfit.step.optimizers import check_steps_alone, check_steps_model, required_arguments

__all__ = [
    "check_optimizer",
    "check_ranks",
    "check_scheduler",
    "device_of",
    "read_plan",
    "with_precision",
]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model.

    Raises:
        UsageError: The model has no parameters.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise UsageError(f"{type(model).__name__} has no parameters, so there is nothing to train.")
    return parameter.device


def check_ranks(plan: Plan, ranks: Ranks) -> None:
    """Refuse a plan whose effective batch does not match the number of ranks."""
    planned, seen = plan.world_size, ranks.world_size
    if planned != seen:
        wrap = ", or wrap the model in DistributedDataParallel" if seen == 1 else ""
        raise UsageError(
            f"The plan is for {planned} rank{'s' * (planned > 1)}, but the model's "
            f"gradients come from {seen}. Plan with world_size={seen}{wrap}."
        )


def check_optimizer(optimizer: object, model: nn.Module) -> None:
    """Refuse what is no single optimizer that steps the model on the gradients that are there.

    Raises:
        UsageError: The value has no parameter groups or no `step`.
        WorkloadError: The optimizer's step needs a closure, or it was made for another model.
    """
    if not (hasattr(optimizer, "param_groups") and callable(getattr(optimizer, "step", None))):
        several = ""
        if isinstance(optimizer, (list, tuple, dict)):
            several = " (several optimizers need a loop of your own, over memfit.micro_batches)"
        raise UsageError(
            f"The optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}"
            f"{several}."
        )
    check_steps_alone(cast("Optimizer", optimizer))
    check_steps_model(cast("Optimizer", optimizer), model)


def check_scheduler(scheduler: object) -> None:
    """Refuse a scheduler that cannot be stepped after each optimizer step.

    Raises:
        UsageError: Its `step` needs an argument, or it has no `step`.
    """
    if scheduler is None:
        return
    name = type(scheduler).__name__
    step = getattr(scheduler, "step", None)
    if not callable(step):
        raise UsageError(f"A scheduler has a method step(), and {name} has none.")
    needed = required_arguments(step)
    if not needed:
        return
    if "epoch" in needed:
        call = "step_update(num_updates) after accumulator.step, or step(epoch) after each epoch"
    else:
        call = f"step({', '.join(needed)}) where it is known, such as after each evaluation"
    raise UsageError(
        f"{name}.step needs {' and '.join(needed)}, which Accumulator does not "
        "know. Do not give this scheduler to Accumulator. Call it yourself: "
        f"{call}."
    )


def read_plan(plan: object) -> tuple[int, int, StepOptions]:
    """Return a plan's micro-batch size, the number that it is a multiple of, and its options."""
    if isinstance(plan, Plan):
        return plan.micro_batch_size, plan.multiple_of, plan.options
    if isinstance(plan, PlanSurvey):
        raise UsageError(
            f"This result has a plan for each of {len(plan.answers)} GPUs, but "
            "training needs one plan. Plan again with gpu=... or device=..., or "
            "give the plan of one answer."
        )
    if isinstance(plan, bool) or not isinstance(plan, int):
        raise UsageError(
            f"The plan must be what memfit.plan returned, or a micro-batch size, not {plan!r}."
        )
    if plan < 1:
        raise UsageError(f"A micro-batch has at least 1 sample, not {plan}.")
    return plan, 1, StepOptions(precision=Precision.FP32)


def with_precision(options: StepOptions, precision: str | Precision | None) -> StepOptions:
    """Return the options, with the given precision if it is not `None`.

    Raises:
        UsageError: There is no such precision.
    """
    if precision is None:
        return options
    known = [choice for choice in Precision if choice is not Precision.AUTO]
    return dataclasses.replace(options, precision=Precision.named(precision, known=known))
