"""Measures the weight of each micro-batch's gradient in the whole batch's gradient.

If the loss is computed outside the model, the gradient of the outputs is used. Its rows for some
samples are a multiple of the gradient of those samples' own loss. If the model computes the loss
itself, the gradient of the parameters is used. It is a weighted sum of the gradients of the parts.
`memfit.equivalence.weighting` finds out which counts explain the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from memfit._torch_private import pytree
from memfit.equivalence.counting import Fit
from memfit.equivalence.gradients import CheckSetup, dense
from memfit.equivalence.samples import Samples
from memfit.equivalence.splits import spans
from memfit.equivalence.state import held_by, same_start
from memfit.equivalence.terms import Parts, Term, kinds_of_summands, named_losses, summands
from memfit.step import batches
from memfit.step.calling import call_model

__all__ = ["Measured", "Measures", "outputs_of"]

_NUM_SKETCHED = 512
_MOVED_SPREAD = 0.05
_MOVED_FAR = 0.5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The weights of some parts for one loss.

    Args:
        name: The name of the loss.
        weights: One weight for each part.
        off: A function of other weights; it returns the share of the whole gradient that they do
            not explain.
        fit: A function of each part's counts of several things; it returns the weights of those
            things.
    """

    name: str
    weights: tuple[float, ...]
    off: Callable[[Sequence[float]], float]
    fit: Fit

    @property
    def unexplained(self) -> float:
        """The share of the whole gradient that no weights explain."""
        return self.off(self.weights)


def outputs_of(setup: CheckSetup) -> Any | None:
    """Return the model's outputs, if all of them have samples in their first dimension."""
    size = setup.num_samples
    outputs = None
    # The whole batch comes last, so that its draws are those that are replayed.
    for count in (*((size // 2,) if size >= 4 else ()), size):  # noqa: PLR2004 - no single samples
        inputs, _ = setup.samples.of(0, count)
        with same_start(setup.holders), setup.draws.recorded():
            outputs = _detached(call_model(setup.model, inputs))
        leaves = pytree.tree_leaves(outputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not tensors or any(leaf.ndim == 0 or len(leaf) != count for leaf in tensors):
            return None
    return outputs


@dataclasses.dataclass(frozen=True, slots=True)
class Measures:
    """Measures the weights of one step's losses.

    Args:
        setup: The step.
        outputs: The model's outputs for the samples; `None` if the model computes its loss itself.
    """

    setup: CheckSetup
    outputs: Any | None

    def of(
        self, cut: Sequence[int], samples: Samples, split: Parts, *, moved: int = 0
    ) -> list[Measured]:
        """Measure the weights of a cut.

        Args:
            cut: Samples in each part.
            samples: The whole batch.
            split: Whether a loss that is one number is measured in parts.
            moved: Measure with other outputs, or other parameters, for the same batch: each sample
                takes the outputs of the sample that is so many places before it.

        Returns:
            The weights of each loss; empty if its summands depend on the samples.
        """
        if self.outputs is None:
            return self._in_parameters(cut, samples, split, moved)
        return self._in_outputs(cut, samples, split, moved)

    def _in_outputs(
        self, cut: Sequence[int], samples: Samples, split: Parts, moved: int
    ) -> list[Measured]:
        repeated = torch.arange(sum(cut)) % self.setup.num_samples
        outputs = batches.reordered(self.outputs, repeated)
        if moved:  # values that the loss can take
            outputs = _mapped(lambda leaf: leaf.roll(moved, 0), outputs)

        def gradients(start: int, stop: int) -> dict[str, list[torch.Tensor]]:
            _, targets = samples.of(start, stop)
            leaves, spec = pytree.tree_flatten(batches.take(outputs, start, stop))
            fresh = [
                leaf.clone().requires_grad_() if _is_numbers(leaf) else leaf for leaf in leaves
            ]
            wanted = [leaf for leaf in fresh if _is_numbers(leaf)]
            with same_start(held_by(self.setup.loss, self.setup.model)), self._draws(start, stop):
                returned = self.setup.loss(pytree.tree_unflatten(fresh, spec), *targets)
                terms = _terms(returned, split)
                return {term.name: term.gradient(wanted) for term in terms}

        whole = gradients(0, sum(cut))
        parts = [gradients(*span) for span in spans(cut)]
        if not _are_alike(whole, parts, split):
            return []  # the summands depend on the samples
        found = []
        for index, (name, leaves) in enumerate(whole.items()):
            rows = [_joined(leaf[start:stop] for leaf in leaves) for start, stop in spans(cut)]
            own = [
                _joined(part[name]) if name in part else torch.zeros_like(row)
                for part, row in zip(parts, rows, strict=True)
            ]
            # In each part's own gradient, the rows of the other parts are zero.
            weights = tuple(map(_factor, rows, own))
            found.append(
                Measured(
                    name=_shown(name, index, split),
                    weights=weights,
                    off=_apart_by_rows(rows, own),
                    fit=_fit_by_rows(rows, own),
                )
            )
        return found

    def _in_parameters(
        self, cut: Sequence[int], samples: Samples, split: Parts, moved: int
    ) -> list[Measured]:
        setup = dataclasses.replace(self.setup, samples=samples)
        wanted = list(setup.parameters().values())

        def gradients(start: int, stop: int) -> dict[str, torch.Tensor]:
            with same_start(setup.holders), self._draws(start, stop):
                if moved:
                    _move(wanted, _MOVED_SPREAD if moved == 1 else _MOVED_FAR)
                losses = setup.losses_of(start, stop)
                return {term.name: _sketch(term.gradient(wanted)) for term in _terms(losses, split)}

        whole = gradients(0, sum(cut))
        parts = [gradients(*span) for span in spans(cut)]
        if not _are_alike(whole, parts, split):
            return []
        found = []
        for index, (name, right) in enumerate(whole.items()):
            none = torch.zeros_like(right)
            columns = torch.stack([part.get(name, none) for part in parts], dim=1)
            fitted = _solved(columns, right)
            found.append(
                Measured(
                    name=_shown(name, index, split),
                    weights=tuple(float(weight) for weight in fitted),
                    off=_apart_by_sum(columns, right),
                    fit=_fit_by_sum(columns, right),
                )
            )
        return found

    def _draws(self, start: int, stop: int) -> contextlib.AbstractContextManager[None]:
        draws = self.setup.draws
        is_whole = (start, stop) == (0, self.setup.num_samples)
        return draws.recorded() if is_whole else draws.replayed(start, stop)


def _terms(returned: Any, split: Parts) -> tuple[Term, ...]:
    losses = named_losses(returned)
    if split is not Parts.WHOLE and len(losses) == 1:
        parts = summands if split is Parts.SUMMANDS else kinds_of_summands
        return parts(next(iter(losses.values())))
    return tuple(Term(name=name, values=(loss,)) for name, loss in losses.items())


def _shown(name: str, index: int, split: Parts) -> str:
    return f"summand {index + 1}" if split is Parts.KINDS else name


def _are_alike(whole: Mapping[str, Any], parts: Sequence[Mapping[str, Any]], split: Parts) -> bool:
    """Whether the parts of a batch have the losses of the whole; they may lack some kinds."""
    if split is Parts.KINDS:
        return all(part.keys() <= whole.keys() for part in parts)
    return all(part.keys() == whole.keys() for part in parts)


def _apart_by_rows(
    rows: list[torch.Tensor], own: list[torch.Tensor]
) -> Callable[[Sequence[float]], float]:
    norm = math.sqrt(sum(_norm(one) ** 2 for one in rows)) or 1.0

    def off(shares: Sequence[float]) -> float:
        apart = (_norm(a - share * b) ** 2 for a, b, share in zip(rows, own, shares, strict=True))
        return math.sqrt(sum(apart)) / norm

    return off


def _apart_by_sum(columns: torch.Tensor, right: torch.Tensor) -> Callable[[Sequence[float]], float]:
    norm = _norm(right) or 1.0

    def off(shares: Sequence[float]) -> float:
        return _norm(columns @ torch.tensor(shares, dtype=torch.float64) - right) / norm

    return off


def _fit_by_rows(rows: list[torch.Tensor], own: list[torch.Tensor]) -> Fit:
    norms = torch.tensor([_norm(one) for one in own], dtype=torch.float64)
    right = torch.tensor([_factor(a, b) for a, b in zip(rows, own, strict=True)]) * norms

    def fit(counts: torch.Tensor) -> torch.Tensor:
        return _solved(norms[:, None] * counts, right)

    return fit


def _fit_by_sum(columns: torch.Tensor, right: torch.Tensor) -> Fit:
    return lambda counts: _solved(columns @ counts, right)


def _solved(columns: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    solution: torch.Tensor = torch.linalg.lstsq(
        columns.double(), right.double()[:, None], driver="gelsd"
    ).solution
    return solution[:, 0]


def _factor(rows: torch.Tensor, own: torch.Tensor) -> float:
    square = float(torch.dot(own, own))
    return float(torch.dot(rows, own)) / square if square else 0.0


def _joined(leaves: Iterable[torch.Tensor]) -> torch.Tensor:
    flat = [_real(leaf).reshape(-1).double() for leaf in leaves]
    # If every target of a part is ignored, its mean is 0 / 0 and contributes nothing.
    return torch.cat(flat).nan_to_num(0.0)


def _sketch(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return some elements of every parameter's gradient, of shape (elements,)."""
    flat = [_real(dense(one)).flatten() for one in gradients]
    return _joined(one[:: max(1, one.numel() // _NUM_SKETCHED)] for one in flat)


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _move(parameters: Iterable[torch.Tensor], spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(1 + spread * noise.to(parameter.dtype))


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], values: Any) -> Any:
    return pytree.tree_map(
        lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf, values
    )


def _detached(values: Any) -> Any:
    return _mapped(lambda leaf: leaf.detach().clone(), values)


def _is_numbers(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
