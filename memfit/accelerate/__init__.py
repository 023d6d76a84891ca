"""Accelerate: an `Accumulator` over its objects, and a search that ends at the edge."""

from memfit.accelerate.accumulating import Accumulator
from memfit.accelerate.searching import find_executable_batch_size

__all__ = ["Accumulator", "find_executable_batch_size"]
