"""The losses of a step: those that the loss function returns, or the summands of one number."""

from __future__ import annotations

import dataclasses
import enum
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch.autograd.graph import GradientEdge, Node

from memfit.step.runner import check_loss, check_losses

__all__ = ["Parts", "Term", "kinds_of_summands", "named_losses", "summands"]

_NUM_SUMMANDS = 4096
_NUM_NODES_COMPARED = 24
# Operations that pass a gradient on unchanged, or times a number independent of the samples.
# Source: tools/autograd/derivatives.yaml.
_LINEAR = (
    *("AddBackward", "SubBackward", "NegBackward", "MulBackward", "DivBackward", "StackBackward"),
    *("CatBackward", "ToCopyBackward", "ViewBackward", "UnsqueezeBackward", "SqueezeBackward"),
    *("ReshapeAliasBackward", "UnsafeViewBackward", "AliasBackward"),
)
_REDUCING = ("SumBackward", "MeanBackward")


class Parts(enum.Enum):
    """What is measured of a loss that is one number.

    `WHOLE`: the number. `SUMMANDS`: each summand. `KINDS`: the summands that are computed alike,
    together. A loop over samples adds one summand of each kind for every sample.
    """

    WHOLE = "whole"
    SUMMANDS = "summands"
    KINDS = "kinds"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One loss, or one summand of a loss, whose gradient can be computed separately.

    Args:
        name: Its name.
        values: The tensors from which backward starts.
        factors: The gradients at these tensors; `None` for 1.
    """

    name: str
    values: tuple[torch.Tensor | GradientEdge, ...]
    factors: tuple[torch.Tensor, ...] | None = None

    def gradient(self, wanted: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the gradients of some tensors; zeros if a tensor has none."""
        if any(isinstance(one, torch.Tensor) and not one.requires_grad for one in self.values):
            return [torch.zeros_like(leaf) for leaf in wanted]
        found: Sequence[torch.Tensor | None] = torch.autograd.grad(
            list(self.values),  # type: ignore[arg-type]
            list(wanted),
            self.factors,
            retain_graph=True,
            allow_unused=True,
        )
        return [
            torch.zeros_like(leaf) if grad is None else grad.detach()
            for leaf, grad in zip(wanted, found, strict=True)
        ]


def named_losses(returned: Any) -> dict[str, torch.Tensor]:
    """Return the losses by name, from one number or a nesting of several.

    Raises:
        WorkloadError: A loss is not one number, or no loss has a gradient.
    """
    if isinstance(returned, Mapping):
        losses = {str(key): loss for key, loss in returned.items()}
    elif isinstance(returned, (tuple, list)):
        losses = {str(index): loss for index, loss in enumerate(returned)}
    else:
        check_loss(returned)
        return {"loss": returned.reshape(())}
    check_losses(tuple(losses.values()))
    return {name: loss.reshape(()) for name, loss in losses.items()}


def summands(loss: torch.Tensor) -> tuple[Term, ...]:
    """Return the summands of a loss, as its graph shows; without summands, the loss itself."""
    found = _factors(loss)
    if len(found) < 2:  # noqa: PLR2004 - one is the loss itself
        return (Term(name="loss", values=(loss,)),)
    return tuple(
        Term(name=f"summand {index + 1}", values=(edge,), factors=(factor,))
        for index, (edge, factor) in enumerate(found.items())
    )


def kinds_of_summands(loss: torch.Tensor) -> tuple[Term, ...]:
    """Return the summands of a loss, with those together that are computed alike.

    The names tell the operations, so that the same kind has the same name in every part of a batch.
    """
    kinds: dict[str, dict[GradientEdge, torch.Tensor]] = {}
    for edge, factor in _factors(loss).items():
        kinds.setdefault(" ".join(_operations(edge.node)), {})[edge] = factor
    return tuple(
        Term(name=name, values=tuple(kind), factors=tuple(kind.values()))
        for name, kind in kinds.items()
    )


def _factors(loss: torch.Tensor) -> dict[GradientEdge, torch.Tensor]:
    """Return the summands of a loss, each with the factor that it is multiplied by."""
    if not loss.requires_grad:
        return {}
    edges: dict[GradientEdge, None] = {}
    left = [(cast("Node", loss.grad_fn), 0)]
    while left:
        node, index = left.pop()
        following: Sequence[tuple[Node | None, int]] = node.next_functions
        inside = [(inner, at) for inner, at in following if inner is not None]
        if inside and _adds(node, inside) and len(edges) + len(left) < _NUM_SUMMANDS:
            left += reversed(inside)
        else:
            edges[GradientEdge(node, index)] = None
    factors: Sequence[torch.Tensor | None] = torch.autograd.grad(
        loss, list(edges), retain_graph=True, allow_unused=True
    )
    return {edge: factor for edge, factor in zip(edges, factors, strict=True) if factor is not None}


def _operations(node: Node) -> Iterator[str]:
    """Yield the names of the last operations that led to a value, and the shapes of its sources.

    The first dimension of a source is left out, because it may be the number of samples.
    """
    left = deque([node])
    for _ in range(_NUM_NODES_COMPARED):
        if not left:
            return
        one = left.popleft()
        source = getattr(one, "variable", None)
        yield one.name() if source is None else f"{one.name()}{tuple(source.shape[1:])}"
        left += (inner for inner, _ in one.next_functions if inner is not None)


def _adds(node: Node, inside: Sequence[tuple[Node, int]]) -> bool:
    name = node.name()
    if name.startswith(("MulBackward", "DivBackward")):
        return len(inside) == 1
    if name.startswith(_REDUCING):
        # A sum over samples is one loss. A sum over stacked losses has several summands.
        return inside[0][0].name().startswith(("StackBackward", "CatBackward"))
    if name.startswith("CatBackward"):
        return all(inner.name().startswith(_LINEAR) for inner, _ in inside)
    return name.startswith(_LINEAR)
