"""Do accumulated gradients equal the full batch's, and if not, what makes them differ?

`verification` runs the experiments that the other modules know how to do: `gradients` accumulates,
`comparison` compares within what rounding explains, and `rounds` does both for one precision;
`mixing` finds layers in which samples meet, `weighting` what a loss averages over, `randomness`
replays draws, `reach` finds where gradients end, and `loops` weighs a user's own accumulation loop.
"""

from memfit.equivalence.loops import AccumulationLoop
from memfit.equivalence.passes import Progress
from memfit.equivalence.splits import splits_of
from memfit.equivalence.verification import verify

__all__ = ["AccumulationLoop", "Progress", "splits_of", "verify"]
