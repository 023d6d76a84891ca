"""fastai: exact accumulation in a `Learner`."""

from memfit.fastai.accumulating import Accumulate

__all__ = ["Accumulate"]
