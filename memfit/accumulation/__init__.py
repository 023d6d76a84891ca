"""The training loop's side of a plan: an effective batch, carried out in micro-batches.

`micro_batches` cuts a batch and computes weights, for loops that call backward themselves.
`Accumulator` does the whole step. When a micro-batch runs out of memory, it repeats the step with
smaller ones. This package does not find out what fits: it takes a plan, or a micro-batch size.
"""

from __future__ import annotations

from memfit.accumulation.accumulator import Accumulator
from memfit.accumulation.splitting import MicroBatch, micro_batches
from memfit.accumulation.weighing import Weight

__all__ = ["Accumulator", "MicroBatch", "Weight", "micro_batches"]
