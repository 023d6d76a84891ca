"""The training loop's side of a plan: an effective batch, carried out in micro-batches.

`Plan.split` cuts and weighs for loops that have a backward of their own; `Accumulator` does the
whole step, and does it again with smaller micro-batches when one runs out of memory. What fits is
not its business: it takes a plan, or a micro-batch size.
"""

from __future__ import annotations

from memfit.accumulation.accumulator import Accumulator
from memfit.accumulation.plans import MicroBatch, Plan
from memfit.accumulation.weighing import Weight

__all__ = ["Accumulator", "MicroBatch", "Plan", "Weight"]
