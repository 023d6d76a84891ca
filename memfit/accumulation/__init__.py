"""The training loop's side of a plan: an effective batch, carried out in micro-batches.

`micro_batches` cuts and weighs for loops that have a backward of their own; `Accumulator` does the
whole step, and does it again with smaller micro-batches when one runs out of memory. What fits is
not its business: it takes a plan, or a micro-batch size.
"""

from __future__ import annotations

from memfit.accumulation.accumulator import Accumulator
from memfit.accumulation.splitting import MicroBatch, micro_batches
from memfit.accumulation.weighing import Weight

__all__ = ["Accumulator", "MicroBatch", "Weight", "micro_batches"]
