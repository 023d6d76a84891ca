"""The public functions: each wires a workload, a backend and what asks of them together.

There is no logic here. `memfit.step` says what is trained, `memfit.backends` where it runs,
`memfit.search` which batch size is tried, and `memfit.partition` in how many parts.
"""

from __future__ import annotations

from memfit.memory.collector import collector_paused

# These import torch, which makes a great many objects that all stay.
with collector_paused(for_good=True):
    from memfit.api.exploring import explore
    from memfit.api.planning import plan, survey_plans
    from memfit.api.probing import estimate, probe, survey
    from memfit.api.profiling import DEFAULT_GPU, profile
    from memfit.api.steps import default_gpus, has_gpu
    from memfit.api.verifying import verify
    from memfit.reports.short import register

register()

__all__ = [
    "DEFAULT_GPU",
    "default_gpus",
    "estimate",
    "explore",
    "has_gpu",
    "plan",
    "probe",
    "profile",
    "survey",
    "survey_plans",
    "verify",
]
