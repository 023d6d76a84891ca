"""The largest batch size that fits a device for a PyTorch training step, measured and proved.

>>> import memfit
>>> result = memfit.probe("resnet50", device="cuda")
>>> result.max_batch_size, result.recommended_batch_size
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from memfit.accumulation import Accumulator, MicroBatch, micro_batches
    from memfit.api import (
        estimate,
        explore,
        plan,
        plan_together,
        probe,
        profile,
        survey,
        survey_plans,
        verify,
    )
    from memfit.errors import (
        DataEndedError,
        DoesNotFitError,
        MemfitError,
        RankFailedError,
        StepCrashedError,
        UnknownDeviceError,
        UnknownModelError,
        UnsupportedError,
        UsageError,
        WorkloadError,
    )
    from memfit.records import (
        Capacity,
        Choice,
        ChoiceRow,
        DeviceProcess,
        Equivalence,
        Exploration,
        GradientFault,
        LoopFault,
        LossTerm,
        MemoryBlock,
        MemoryProfile,
        MixingLayer,
        Objective,
        Outcome,
        Plan,
        PlanSurvey,
        Precision,
        ProbeResult,
        Recomputation,
        Role,
        Source,
        StepOptions,
        Survey,
        SurveyAnswer,
        Sweep,
        SweepRow,
        Trial,
        Verdict,
    )
    from memfit.rehearsal.activate import rehearse
    from memfit.step.checkpointing import checkpoint
    from memfit.step.workload import Workload
    from memfit.sweeping import choose, sweep

# Torch takes seconds to import, so each name is fetched when it is first used.
_HOMES = {
    "memfit.accumulation": ("Accumulator", "MicroBatch", "micro_batches"),
    "memfit.api": (
        "estimate",
        "explore",
        "plan",
        "plan_together",
        "probe",
        "profile",
        "survey",
        "survey_plans",
        "verify",
    ),
    "memfit.errors": (
        "DataEndedError",
        "DoesNotFitError",
        "MemfitError",
        "RankFailedError",
        "StepCrashedError",
        "UnknownDeviceError",
        "UnknownModelError",
        "UnsupportedError",
        "UsageError",
        "WorkloadError",
    ),
    "memfit.records": (
        "Capacity",
        "Choice",
        "ChoiceRow",
        "DeviceProcess",
        "Equivalence",
        "Exploration",
        "GradientFault",
        "LoopFault",
        "LossTerm",
        "MemoryBlock",
        "MemoryProfile",
        "MixingLayer",
        "Objective",
        "Outcome",
        "Plan",
        "PlanSurvey",
        "Precision",
        "ProbeResult",
        "Recomputation",
        "Role",
        "Source",
        "StepOptions",
        "Survey",
        "SurveyAnswer",
        "Sweep",
        "SweepRow",
        "Trial",
        "Verdict",
    ),
    "memfit.rehearsal.activate": ("rehearse",),
    "memfit.step.checkpointing": ("checkpoint",),
    "memfit.step.workload": ("Workload",),
    "memfit.sweeping": ("choose", "sweep"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Accumulator",
    "Capacity",
    "Choice",
    "ChoiceRow",
    "DataEndedError",
    "DeviceProcess",
    "DoesNotFitError",
    "Equivalence",
    "Exploration",
    "GradientFault",
    "LoopFault",
    "LossTerm",
    "MemfitError",
    "MemoryBlock",
    "MemoryProfile",
    "MicroBatch",
    "MixingLayer",
    "Objective",
    "Outcome",
    "Plan",
    "PlanSurvey",
    "Precision",
    "ProbeResult",
    "RankFailedError",
    "Recomputation",
    "Role",
    "Source",
    "StepCrashedError",
    "StepOptions",
    "Survey",
    "SurveyAnswer",
    "Sweep",
    "SweepRow",
    "Trial",
    "UnknownDeviceError",
    "UnknownModelError",
    "UnsupportedError",
    "UsageError",
    "Verdict",
    "Workload",
    "WorkloadError",
    "__version__",
    "checkpoint",
    "choose",
    "estimate",
    "explore",
    "micro_batches",
    "plan",
    "plan_together",
    "probe",
    "profile",
    "rehearse",
    "survey",
    "survey_plans",
    "sweep",
    "verify",
]


# Modules that need a trainer's library, so they are loaded when they are named.
_BRIDGES = ("accelerate", "fastai", "lightning", "transformers")


def __getattr__(name: str) -> Any:
    if name in _BRIDGES:
        return importlib.import_module(f"memfit.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'memfit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
