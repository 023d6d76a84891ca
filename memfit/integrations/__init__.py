"""Small modules that write a plan for other trainers.

Each module knows how one trainer counts (micro-batches or samples, per process or in total), and
which plans it cannot express. Nothing here imports a trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from memfit.integrations import accelerate, fastai, lightning, pytorch, timm, transformers
from memfit.records import Plan

__all__ = ["TRAINERS", "lines_for"]

TRAINERS: Final[Mapping[str, Callable[[Plan], str]]] = MappingProxyType(
    {
        "pytorch": pytorch.lines,
        "timm": timm.lines,
        "lightning": lightning.lines,
        "accelerate": accelerate.lines,
        "transformers": transformers.lines,
        "fastai": fastai.lines,
    }
)
"""What writes a plan for each trainer."""


def lines_for(plan: Plan, trainer: str) -> str:
    """Return the lines to paste, or the command to run, that carry a plan out.

    Args:
        plan: The plan.
        trainer: A key of `TRAINERS`.

    Raises:
        UsageError: The trainer takes equal parts only, and none are near the plan's parts.
    """
    return TRAINERS[trainer](plan)
