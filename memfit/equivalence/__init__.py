"""Do accumulated gradients equal the full batch's, and if not, what makes them differ?

`verification` runs the experiments that the other modules know how to do: `gradients` accumulates,
from one `state`, and in float64 throughout (`widening`); `comparison` compares within what rounding
explains, and `passes` does both for one precision. `mixing` finds layers in which samples meet;
`weighting` finds what losses average over, from what `measuring` measures of their `terms` and what
`counting` counts; `randomness` replays draws, `gradient_flow` finds where gradients end, `causes`
says why gradients differ, and `loops` weighs a user's own accumulation loop.
"""

from memfit.equivalence.loops import AccumulationLoop
from memfit.equivalence.passes import Progress
from memfit.equivalence.splits import splits_of
from memfit.equivalence.verification import verify

__all__ = ["AccumulationLoop", "Progress", "splits_of", "verify"]
