"""Lightning: exact accumulation in a module's own `training_step`, and a plan before `fit`."""

from memfit.lightning.accumulating import accumulating
from memfit.lightning.planning import plan_before_fit

__all__ = ["accumulating", "plan_before_fit"]
