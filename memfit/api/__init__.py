"""The public functions: each connects a workload, a backend, and a search, plan or profile.

There is no logic here. `memfit.step` describes what is trained, and `memfit.backends` where it
runs. `memfit.search` decides which batch size is tried, and `memfit.partition` how a batch is cut.
"""

from __future__ import annotations

from memfit.memory.collector import collector_paused

# These import torch, which creates very many objects that are never freed.
with collector_paused(for_good=True):
    from memfit.api.exploring import explore
    from memfit.api.planning import plan, plan_together, survey_plans
    from memfit.api.probing import estimate, probe, survey
    from memfit.api.profiling import DEFAULT_GPU, profile
    from memfit.api.steps import default_gpus, has_gpu
    from memfit.api.verifying import verify
    from memfit.rehearsal.activate import show_driver
    from memfit.reports import short, short_findings
    from memfit.simulation.cudnn.backend_api import bring_driver_with

short.register()
short_findings.register()
bring_driver_with(show_driver)

__all__ = [
    "DEFAULT_GPU",
    "default_gpus",
    "estimate",
    "explore",
    "has_gpu",
    "plan",
    "plan_together",
    "probe",
    "profile",
    "survey",
    "survey_plans",
    "verify",
]
