"""Do accumulated gradients equal the full batch's, and if not, what makes them differ?

`verification` runs the experiments of the other modules on a `subject`; `proof` has those that the
verdict rests on.

- `gradients` accumulates gradients. Every pass begins from one `state`. `widening` makes all of it
  float64.
- `comparison` compares gradients, and allows the differences that rounding explains. `rounds` does
  both once, and `passes` until random draws are dealt with.
- `mixing` finds layers that mix samples.
- `weighting` finds out what losses average over. `measuring` measures the weights of their `terms`,
  and `counting` counts what a batch contains.
- `randomness` replays random draws. `gradient_flow` finds layers that stop gradients.
- `causes` says why gradients differ. `loops` examines a user's own accumulation loop.
"""

from memfit.equivalence.loops import AccumulationLoop
from memfit.equivalence.splits import splits_of
from memfit.equivalence.verification import verify
from memfit.equivalence.whole_and_cut import Progress

__all__ = ["AccumulationLoop", "Progress", "splits_of", "verify"]
