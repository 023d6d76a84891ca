"""The losses of a step: those that the loss function returns, or the summands of one number."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch.autograd.graph import GradientEdge, Node

from memfit.errors import WorkloadError
from memfit.step.runner import check_loss

__all__ = ["Term", "named_losses", "summands"]

_NUM_SUMMANDS = 32
# Operations that pass a gradient on unchanged, or times a number independent of the samples.
# Source: tools/autograd/derivatives.yaml.
_LINEAR = (
    *("AddBackward", "SubBackward", "NegBackward", "MulBackward", "DivBackward", "StackBackward"),
    *("CatBackward", "ToCopyBackward", "ViewBackward", "UnsqueezeBackward", "SqueezeBackward"),
    *("ReshapeAliasBackward", "UnsafeViewBackward", "AliasBackward"),
)
_REDUCING = ("SumBackward", "MeanBackward")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One loss, or one summand of a loss, whose gradient can be computed separately.

    Args:
        name: Its name.
        value: The tensor from which backward starts.
        factor: The gradient at that tensor; `None` for 1.
    """

    name: str
    value: torch.Tensor | GradientEdge
    factor: torch.Tensor | None = None

    def gradient(self, wanted: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the gradients of some tensors; zeros if a tensor has none."""
        if isinstance(self.value, torch.Tensor) and not self.value.requires_grad:
            return [torch.zeros_like(leaf) for leaf in wanted]
        found: Sequence[torch.Tensor | None] = torch.autograd.grad(
            [self.value],  # type: ignore[arg-type]
            list(wanted),
            None if self.factor is None else [self.factor],
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
    for loss in losses.values():
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or loss.requires_grad:
            check_loss(loss)
    if not any(loss.requires_grad for loss in losses.values()):
        raise WorkloadError(
            "None of the losses has a gradient, because none depends on the parameters."
        )
    return {name: loss.reshape(()) for name, loss in losses.items()}


def summands(loss: torch.Tensor) -> tuple[Term, ...]:
    """Return the summands of a loss, as its graph shows; without summands, the loss itself."""
    whole = (Term(name="loss", value=loss),)
    if not loss.requires_grad:
        return whole
    edges: list[GradientEdge] = []
    left = [(cast("Node", loss.grad_fn), 0)]
    while left:
        node, index = left.pop()
        following: Sequence[tuple[Node | None, int]] = node.next_functions
        inside = [(inner, at) for inner, at in following if inner is not None]
        if inside and _adds(node, inside) and len(edges) + len(left) < _NUM_SUMMANDS:
            left += reversed(inside)
        elif GradientEdge(node, index) not in edges:
            edges.append(GradientEdge(node, index))
    if len(edges) < 2:  # noqa: PLR2004 - one is the loss itself
        return whole
    factors: Sequence[torch.Tensor | None] = torch.autograd.grad(
        loss, edges, retain_graph=True, allow_unused=True
    )
    return tuple(
        Term(name=f"summand {index + 1}", value=edge, factor=factor)
        for index, (edge, factor) in enumerate(zip(edges, factors, strict=True))
        if factor is not None
    )


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
