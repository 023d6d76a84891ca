"""Runs one search or one plan on one backend, and tries changes of the step.

This package decides the order of trials. `memfit.search` decides which batch size comes next, and
`memfit.partition` how samples are cut into parts.
"""

from __future__ import annotations

from memfit.planning.alternatives import ChangeKind, StepChange, changes_of, explore_on
from memfit.planning.planner import PlanTarget, plan_on, remarks_on
from memfit.planning.searching import SearchOptions, probe_on, run_search
from memfit.planning.together import plan_together

__all__ = [
    "ChangeKind",
    "PlanTarget",
    "SearchOptions",
    "StepChange",
    "changes_of",
    "explore_on",
    "plan_on",
    "plan_together",
    "probe_on",
    "remarks_on",
    "run_search",
]
