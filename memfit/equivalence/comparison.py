"""Decides whether rounding explains the difference between two gradients of one batch.

Two gradients are compared parameter by parameter. The difference must stay below a bound that adds
up three terms:

- Writing: every micro-batch's gradient is rounded when it is written, and again when it is added to
  the gradients before it. The term is 3 u x sqrt(sum ||t_i||^2 + sum ||s_i||^2). Here u is the unit
  roundoff of the type that gradients are written in. The t_i are the weighted gradients of the
  micro-batches, and the s_i their partial sums; both are measured, for both gradients. The factor 3
  is for layers whose own backward adds more rounding.
- Summing: each gradient is a sum of n values (samples x values of a sample), added in the
  accumulator's type. The term is v x sqrt(n) x the same norm, as in random-walk rounding.
- Amplified rounding: layers can amplify earlier rounding. The reference is computed once more with
  its samples in another order, and a multiple of that difference is allowed. If that does not
  explain the difference, the reference is computed again with its weights changed by one unit
  roundoff at random. Another order leaves the rounding inside a layer as it is if a kernel computes
  each sample alike; other weights do not.

No bound of a proof is larger than its ceiling. In float64 the ceiling is 1e-6. If another order of
samples changes a gradient by more than that, the order itself matters, not rounding. In the
precision of training, a gradient whose bound is above the floor of its precision is in noise: the
comparison says nothing about it, and the report says so.

The rounding errors of m elements average out. So the scale of a gradient has a tighter bound than
its distance: 5 / sqrt(m) of the error that is likely for one element. This bound finds an error of
1% in arithmetic of two or three digits. A gradient that is far smaller than the model's typical
gradient is compared with the typical one, because rounding of larger values makes most of its
digits.

Source: Higham and Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci.
    Comput. 41(5), 2019, for sqrt(n) in place of n. Parker, "Monte Carlo arithmetic", UCLA
    CSD-970002, 1997, for random changes of one unit roundoff.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence

import torch

from memfit.equivalence.gradients import CheckSetup, Gradients
from memfit.records import GradientCheck, ParameterDifference, Precision
from memfit.step.nesting import leaves_of

__all__ = ["CEILING", "ceiling_of", "check", "roundoff_of", "vanishing_in"]

_NUM_LISTED = 20
_PERMUTATION_FACTOR = 4.0  # both differences have the same spread; 4 of it miss 1 in 10^4
_WRITING_FACTOR = 3.0  # weight standardisation doubles rounding in bf16; docs/equivalence.md
_SCALE_SIGMAS = 5.0
_MEASURING_ROUNDOFF = 2.0**-51  # of a scale near 1
_NUM_LOOKED_AT = 65_536
_UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
_WRITTEN_IN = {
    None: torch.float64,
    Precision.FP32: torch.float32,
    Precision.AMP_BF16: torch.bfloat16,
    Precision.BF16: torch.bfloat16,
    Precision.AMP_FP16: torch.float16,
}
_TF32_ROUNDOFF = 2.0**-11

CEILING = 1e-6
"""No relative error above this is ever called equal in float64. Rounding is about 1e-15 there, and
an ill-conditioned model may lose half of the sixteen digits."""

_CEILING_OF_PROOF = 1e-4  # in float32, if the step cannot run in float64

# If rounding alone may move a gradient further than this, it is in noise.
_NOISE_FLOOR = {torch.float32: 1e-2}
_NOISE_FLOOR_BELOW = 0.1  # for types of two or three digits


def check(
    setup: CheckSetup,
    reference: Gradients,
    other: Gradients,
    *,
    shuffled: Gradients | None = None,
    rounded: Sequence[Gradients] = (),
    reference_cut: tuple[int, ...],
    cut: tuple[int, ...],
    vanishing: frozenset[str] = frozenset(),
    is_proof: bool = False,
    message: str | None = None,
) -> GradientCheck:
    """Compare two gradients of one effective batch.

    Args:
        setup: The step that was run.
        reference: The full batch's gradients.
        other: The gradients of the same batch in another cut.
        shuffled: The reference computed again, with the samples in another order; `None` to allow
            no rounding that the order amplifies.
        rounded: The reference computed again, with its weights within one rounding; empty to allow
            no rounding that the layers amplify.
        reference_cut: How the reference was cut; a single micro-batch if it was not.
        cut: How the batch was cut for `other`.
        vanishing: Parameters whose gradient is known to be zero apart from rounding.
        is_proof: The verdict rests on this precision.
        message: Why the reference is cut, if it is.

    Returns:
        The comparison.
    """
    rounding = _Rounding.of(setup)
    typical = _typical(reference)
    ceiling = ceiling_of(setup, is_proof=is_proof) if is_proof else math.inf
    floor = math.inf if is_proof else _noise_floor(setup)
    compared = [
        _difference(
            name,
            reference.values[name],
            other.values[name],
            None if shuffled is None else shuffled.values[name],
            [one.values[name] for one in rounded],
            written=math.sqrt(reference.written_squares[name] + other.written_squares[name]),
            typical=typical,
            rounding=rounding,
            known_to_vanish=name in vanishing,
            ceiling=ceiling,
            floor=floor,
        )
        for name in reference.values
        if not (reference.values[name] is None and other.values[name] is None)
    ]
    compared.sort(key=_rank, reverse=True)
    return GradientCheck(
        precision=setup.precision_name,
        device=str(setup.device),
        reference=reference_cut,
        cut=cut,
        unit_roundoff=rounding.written,
        num_summands=rounding.num_summands,
        num_parameters=len(compared),
        num_differing=sum(difference.differs for difference in compared),
        worst=tuple(compared[:_NUM_LISTED]),
        worst_relative_error=max(
            (d.relative_error for d in compared if not d.in_noise), default=0.0
        ),
        num_in_noise=sum(difference.in_noise for difference in compared),
        noise=max((d.relative_error for d in compared if d.in_noise), default=None),
        message=message,
    )


def ceiling_of(setup: CheckSetup, *, is_proof: bool) -> float:
    """Return the relative error above which a difference is hardly rounding.

    Args:
        setup: The step that was run.
        is_proof: The verdict rests on this precision, so gradients are never equal above it.
    """
    if setup.precision is None:
        return CEILING
    return _CEILING_OF_PROOF if is_proof else _noise_floor(setup)


def roundoff_of(setup: CheckSetup) -> float:
    """Return the unit roundoff of the type that gradients are written in."""
    return _Rounding.of(setup).written


def _noise_floor(setup: CheckSetup) -> float:
    return _NOISE_FLOOR.get(_WRITTEN_IN[setup.precision], _NOISE_FLOOR_BELOW)


def vanishing_in(setup: CheckSetup, reference: Gradients) -> frozenset[str]:
    """Return the parameters whose gradient is zero apart from rounding.

    Args:
        setup: The step that was run. Only float64 can tell zero from a small gradient.
        reference: The full batch's gradients.
    """
    share = _Rounding.of(setup).vanishing * _typical(reference)
    return frozenset(
        name
        for name, value in reference.values.items()
        if value is not None and _norm(value) <= share * math.sqrt(value.numel())
    )


def _typical(gradients: Gradients) -> float:
    """Return the root mean square of all gradients' elements."""
    values = [value for value in gradients.values.values() if value is not None]
    total = math.sqrt(sum(_norm(value) ** 2 for value in values))
    return total / math.sqrt(max(1, sum(value.numel() for value in values)))


def _rank(difference: ParameterDifference) -> tuple[bool, bool, float]:
    """Return a key that puts what differs last, and the largest error at the very end."""
    error = difference.relative_error
    return difference.differs, not difference.in_noise, math.inf if math.isnan(error) else error


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Rounding:
    """Unit roundoffs of a check: of written gradients, and of the sums inside them.

    Args:
        written: Of each element on its own.
        summed: Of the sums.
        num_summands: The number of values in a sum.
        shared: What all elements of a gradient may be off by together.
    """

    written: float
    summed: float
    num_summands: int
    shared: float = 0.0

    @property
    def vanishing(self) -> float:
        """A gradient below this share of the typical one consists mostly of rounding."""
        return math.sqrt(self.summed)

    @classmethod
    def of(cls, setup: CheckSetup) -> _Rounding:
        per_sample = max(
            (
                leaf.numel() // setup.num_samples
                for leaf in leaves_of(setup.samples.batch)
                if isinstance(leaf, torch.Tensor)
            ),
            default=1,
        )
        written = _UNIT_ROUNDOFF[_WRITTEN_IN[setup.precision]]
        summed = _UNIT_ROUNDOFF[torch.float64 if setup.precision is None else torch.float32]
        shared = 0.0
        if setup.precision is not None and setup.device.type == "cuda" and _may_use_tf32():
            written = max(written, _TF32_ROUNDOFF)
            # A weight is rounded once for all samples. Whether it is rounded depends on the kernel,
            # which depends on the batch size. So both operands may differ in both passes.
            shared = 4 * _TF32_ROUNDOFF
        # A user's model may have weights of a narrower type than the precision.
        for parameter in setup.parameters().values():
            written = max(written, _UNIT_ROUNDOFF.get(parameter.dtype, 0.0))
        return cls(
            written=written,
            summed=summed,
            num_summands=max(1, setup.num_samples * max(1, per_sample)),
            shared=shared,
        )


def _may_use_tf32() -> bool:
    allowed = True  # the default for convolutions
    # torch has two settings for this, and refuses one after the other was used.
    with contextlib.suppress(RuntimeError):
        allowed = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return allowed


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=_double(tensor.dtype)))


def _double(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _difference(
    name: str,
    reference: torch.Tensor | None,
    other: torch.Tensor | None,
    shuffled: torch.Tensor | None,
    rounded: Sequence[torch.Tensor | None],
    *,
    written: float,
    typical: float,
    rounding: _Rounding,
    known_to_vanish: bool,
    ceiling: float,
    floor: float,
) -> ParameterDifference:
    if reference is None or other is None:
        # Only one of the two passes gave this parameter a gradient.
        got = _norm(reference if reference is not None else other)  # type: ignore[arg-type]
        return ParameterDifference(
            name=name,
            relative_error=1.0 if got else 0.0,
            bound=0.0,
            scale=0.0 if got else None,
            scale_bound=0.0,
        )
    b, a = _flat(reference), _flat(other)
    noise = 0.0 if shuffled is None else _norm(_flat(shuffled) - b)
    moves = [_flat(one) - b for one in rounded if one is not None]
    amplified = max([noise, *map(_norm, moves)])
    norm, apart = _norm(b), _norm(a - b)
    usual = typical * math.sqrt(b.numel())
    vanishes = known_to_vanish or norm <= rounding.vanishing * usual
    unit = usual if vanishes else norm
    if unit == 0:
        return ParameterDifference(
            name=name,
            relative_error=1.0 if apart else 0.0,
            bound=0.0,
            scale=None,
            scale_bound=0.0,
            vanishes=True,
        )
    summing = rounding.summed * math.sqrt(rounding.num_summands)
    other_terms = summing * (written + usual) + _PERMUTATION_FACTOR * noise
    more = _PERMUTATION_FACTOR * (amplified - noise)
    # A vanishing gradient is a sum of rounding of typical size, so that size counts.
    writing = rounding.written * (usual if vanishes else written)
    tight = (_WRITING_FACTOR * writing + other_terms) / unit
    bound = min(ceiling, tight + more / unit)
    is_within = apart / unit <= tight
    in_noise = bound > floor and not is_within
    likely = (writing + other_terms + (0.0 if is_within else more)) / unit
    # The difference is small and exact, so the scale that follows from it is exact too.
    scale = None if vanishes else 1 + float(torch.dot(a - b, b)) / norm**2
    scale_bound = bound
    if scale is not None and not in_noise:
        carrying = _num_carrying(b)
        scale_bound = _averaged(bound, likely, carrying)
        # If the distance is too large, it does not matter how closely the scale is judged.
        if abs(scale - 1) > scale_bound and apart / unit <= bound:
            # Equal elements are rounded alike, so only rounding of different ones averages out.
            scale_bound = _averaged(bound, likely, min(carrying, _num_different(b)))
        # Neither does rounding average out that is shared by many elements.
        shared = _root_mean_square([float(torch.dot(move, b)) / norm**2 for move in moves])
        scale_bound = max(scale_bound, rounding.shared, _PERMUTATION_FACTOR * shared)
        scale_bound = min(bound, scale_bound)
    return ParameterDifference(
        name=name,
        relative_error=apart / unit,
        bound=bound,
        scale=scale,
        scale_bound=scale_bound,
        vanishes=vanishes,
        in_noise=in_noise,
    )


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value**2 for value in values) / max(1, len(values)))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.detach().reshape(-1).double()


def _averaged(bound: float, likely: float, num_elements: float) -> float:
    """Return the bound of a mean over elements that each have the likely error."""
    return max(_MEASURING_ROUNDOFF, min(bound, likely * _SCALE_SIGMAS / math.sqrt(num_elements)))


def _num_carrying(gradient: torch.Tensor) -> float:
    """Return how many elements make up most of the norm; their rounding averages out."""
    squares = gradient.square()
    fourth = float(squares.square().sum())
    carrying = float(squares.sum()) ** 2 / fourth if fourth else 1.0
    return max(1.0, carrying)


def _num_different(gradient: torch.Tensor) -> int:
    looked_at = gradient[:: max(1, gradient.numel() // _NUM_LOOKED_AT)]
    return int(looked_at.unique().numel())
