"""transformers: exact accumulation in a `Trainer`."""

from memfit.transformers.accumulating import Accumulating

__all__ = ["Accumulating"]
