"""One search or one plan carried out on one backend, and what a changed step would make fit.

The order of trials is decided here; which batch size comes next is `memfit.search`'s decision, and
how samples are cut into parts `memfit.partition`'s.
"""

from __future__ import annotations

from memfit.planning.alternatives import ChangeKind, StepChange, changes_of, explore_on
from memfit.planning.planner import PlanTarget, plan_on
from memfit.planning.searching import SearchBounds, check_bounds, probe_on, run_search

__all__ = [
    "ChangeKind",
    "PlanTarget",
    "SearchBounds",
    "StepChange",
    "changes_of",
    "check_bounds",
    "explore_on",
    "plan_on",
    "probe_on",
    "run_search",
]
