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
    from memfit.api import estimate, probe, profile, survey, verify
    from memfit.errors import (
        DoesNotFitError,
        MemfitError,
        StepCrashedError,
        UnknownDeviceError,
        UnknownModelError,
        UnsupportedError,
        UsageError,
        WorkloadError,
    )
    from memfit.records import (
        Capacity,
        DeviceProcess,
        Equivalence,
        LoopFault,
        MemoryBlock,
        MemoryProfile,
        Mixer,
        Outcome,
        Precision,
        ProbeResult,
        Role,
        Source,
        StepOptions,
        Survey,
        SurveyAnswer,
        Trial,
        Verdict,
    )
    from memfit.workload import Workload

# Torch takes seconds to import, so each name is fetched when it is first used.
_HOMES = {
    "memfit.api": ("estimate", "probe", "profile", "survey", "verify"),
    "memfit.errors": (
        "DoesNotFitError",
        "MemfitError",
        "StepCrashedError",
        "UnknownDeviceError",
        "UnknownModelError",
        "UnsupportedError",
        "UsageError",
        "WorkloadError",
    ),
    "memfit.records": (
        "Capacity",
        "DeviceProcess",
        "Equivalence",
        "LoopFault",
        "MemoryBlock",
        "MemoryProfile",
        "Mixer",
        "Outcome",
        "Precision",
        "ProbeResult",
        "Role",
        "Source",
        "StepOptions",
        "Survey",
        "SurveyAnswer",
        "Trial",
        "Verdict",
    ),
    "memfit.workload": ("Workload",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Capacity",
    "DeviceProcess",
    "DoesNotFitError",
    "Equivalence",
    "LoopFault",
    "MemfitError",
    "MemoryBlock",
    "MemoryProfile",
    "Mixer",
    "Outcome",
    "Precision",
    "ProbeResult",
    "Role",
    "Source",
    "StepCrashedError",
    "StepOptions",
    "Survey",
    "SurveyAnswer",
    "Trial",
    "UnknownDeviceError",
    "UnknownModelError",
    "UnsupportedError",
    "UsageError",
    "Verdict",
    "Workload",
    "WorkloadError",
    "__version__",
    "estimate",
    "probe",
    "profile",
    "survey",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'memfit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
