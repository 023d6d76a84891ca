"""The records that travel between memfit's parts.

All are frozen, hold integers of bytes, and turn into plain dictionaries for JSON with `to_dict`.
Nothing here knows torch, runs a trial or formats a figure for people.
"""

from __future__ import annotations

from memfit.records.base import (
    SCHEMA_VERSION,
    Engine,
    Record,
    Source,
)
from memfit.records.equivalence import (
    BufferDrift,
    Equivalence,
    GradientCheck,
    LoopFault,
    LoopWindow,
    LossWeighting,
    MixesIn,
    MixingLayer,
    ParameterDifference,
    Verdict,
)
from memfit.records.plans import (
    Alternative,
    Exploration,
    Objective,
    Plan,
    PlanAnswer,
    PlanSurvey,
)
from memfit.records.profiles import (
    CardLine,
    Change,
    MemoryBlock,
    MemoryProfile,
    ModuleShare,
    Peak,
    Phase,
    RecordedStep,
    Role,
    RoleShare,
    Timeline,
)
from memfit.records.rehearsals import (
    DeviceRead,
    HeldBytes,
    ReadKind,
    Rehearsal,
    RehearsalEnd,
    RehearsedPhase,
    RehearsedProcess,
    RehearsedStep,
    Shortage,
)
from memfit.records.steps import (
    Precision,
    StepOptions,
)
from memfit.records.trials import (
    Action,
    Capacity,
    DeviceProcess,
    Event,
    Outcome,
    ProbeResult,
    Survey,
    SurveyAnswer,
    Trial,
)

__all__ = [
    "SCHEMA_VERSION",
    "Action",
    "Alternative",
    "BufferDrift",
    "Capacity",
    "CardLine",
    "Change",
    "DeviceProcess",
    "DeviceRead",
    "Engine",
    "Equivalence",
    "Event",
    "Exploration",
    "GradientCheck",
    "HeldBytes",
    "LoopFault",
    "LoopWindow",
    "LossWeighting",
    "MemoryBlock",
    "MemoryProfile",
    "MixesIn",
    "MixingLayer",
    "ModuleShare",
    "Objective",
    "Outcome",
    "ParameterDifference",
    "Peak",
    "Phase",
    "Plan",
    "PlanAnswer",
    "PlanSurvey",
    "Precision",
    "ProbeResult",
    "ReadKind",
    "Record",
    "RecordedStep",
    "Rehearsal",
    "RehearsalEnd",
    "RehearsedPhase",
    "RehearsedProcess",
    "RehearsedStep",
    "Role",
    "RoleShare",
    "Shortage",
    "Source",
    "StepOptions",
    "Survey",
    "SurveyAnswer",
    "Timeline",
    "Trial",
    "Verdict",
]
