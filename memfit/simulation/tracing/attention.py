"""Which kernel `scaled_dot_product_attention` uses on a card, and what it keeps for backward.

Flash attention and memory-efficient attention save their output and one log-sum-exp for each row.
The math path saves the matrix of probabilities. The kernel is chosen by the conditions of PyTorch
2.8 and later.

Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (order and gates),
    aten/src/ATen/native/transformers/attention.cpp (padding of head dimensions and masks).
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any

import torch

from memfit._torch_private import aten

__all__ = ["AttentionBackend", "AttentionCall", "attend", "choose"]

_FLASH_MAX_HEAD_DIM = 256
_FLASH_ALIGNMENT = 8


class AttentionBackend(enum.Enum):
    """The kernels of `scaled_dot_product_attention`."""

    FLASH = "flash"
    EFFICIENT = "efficient"
    CUDNN = "cudnn"
    MATH = "math"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """What the choice of a kernel depends on, besides the card.

    Args:
        dtype: The type of query, key and value.
        head_dim: The head dimension of query and key.
        value_head_dim: The head dimension of value.
        has_mask: Whether a mask or a bias is given.
        is_grouped: Whether key and value have fewer heads than query.
        has_dropout: Whether probabilities are dropped.
        is_cross_causal: Whether attention is causal and the numbers of queries and keys differ.
        learns_mask: Whether the bias gets a gradient, which cuDNN's kernel does not give.
    """

    dtype: torch.dtype
    head_dim: int
    value_head_dim: int
    has_mask: bool
    is_grouped: bool
    has_dropout: bool
    is_cross_causal: bool
    learns_mask: bool = False


def choose(
    call: AttentionCall, compute_capability: tuple[int, int], *, prefers_cudnn: bool = False
) -> AttentionBackend:
    """Return the kernel that a card uses in training.

    Args:
        call: The attention.
        compute_capability: The compute capability of the card, such as (8, 6).
        prefers_cudnn: Whether the build tries cuDNN's kernel first if the card has it (compute
            capability 9.0 and 10.x, PyTorch 2.11 and later with its cuDNN).
    """
    is_half = call.dtype in (torch.float16, torch.bfloat16)
    major, minor = compute_capability
    if call.head_dim == 0 or call.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return AttentionBackend.MATH
    if (
        prefers_cudnn
        and major in (9, 10)
        and is_half
        and not call.learns_mask
        and call.head_dim == call.value_head_dim
        and call.head_dim % 8 == 0
        and call.head_dim <= 128  # noqa: PLR2004 - cuDNN's limit in training
    ):
        return AttentionBackend.CUDNN
    if is_half and _flash_takes(call, major, minor):
        return AttentionBackend.FLASH
    if _efficient_takes(call, major, is_half=is_half):
        return AttentionBackend.EFFICIENT
    return AttentionBackend.MATH


def _flash_takes(call: AttentionCall, major: int, minor: int) -> bool:
    if major < 8 or call.has_mask or call.is_cross_causal:  # noqa: PLR2004 - Ampere
        return False
    if call.head_dim != call.value_head_dim or call.head_dim > _FLASH_MAX_HEAD_DIM:
        return False
    is_small_chip = (major == 8 and minor in (6, 7, 9)) or major == 12  # noqa: PLR2004
    padded = math.ceil(call.head_dim / _FLASH_ALIGNMENT) * _FLASH_ALIGNMENT
    return not (is_small_chip and (192 < padded <= 224 or (padded > 224 and call.has_dropout)))  # noqa: PLR2004


def _efficient_takes(call: AttentionCall, major: int, *, is_half: bool) -> bool:
    if major < 5 or call.is_grouped:  # noqa: PLR2004 - Maxwell
        return False
    if call.dtype is torch.bfloat16 and major < 8:  # noqa: PLR2004
        return False
    if major >= 8:  # noqa: PLR2004
        alignment = 8 if is_half else 4
    elif major == 7:  # noqa: PLR2004
        alignment = 8 if is_half else 1
    else:
        alignment = 1
    return call.head_dim % alignment == 0 and call.value_head_dim % alignment == 0


def describe(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
) -> AttentionCall:
    """Return what the choice of a kernel depends on.

    Args:
        query: Shape (..., heads, queries, head_dim).
        key: Shape (..., heads, keys, head_dim).
        value: Shape (..., heads, keys, value_head_dim).
        mask: Mask or bias that broadcasts to (..., heads, queries, keys).
        dropout: The share of probabilities that is dropped.
        is_causal: Whether a query sees only the keys up to its own position.
    """
    return AttentionCall(
        dtype=query.dtype if query.ndim == 4 else torch.float64,  # noqa: PLR2004 - else math
        head_dim=query.shape[-1],
        value_head_dim=value.shape[-1],
        has_mask=mask is not None,
        is_grouped=query.ndim == 4 and query.shape[1] != key.shape[1],  # noqa: PLR2004
        has_dropout=dropout > 0,
        is_cross_causal=is_causal and query.shape[-2] != key.shape[-2],
        learns_mask=mask is not None and mask.requires_grad,
    )


def attend(
    backend: AttentionBackend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Run attention on meta tensors, with the same operations as a kernel's autograd.

    Args:
        backend: The kernel.
        query: Shape (samples, heads, queries, head_dim).
        key: Shape (samples, heads, keys, head_dim).
        value: Shape (samples, heads, keys, value_head_dim).
        mask: Mask or bias that broadcasts to (samples, heads, queries, keys).
        dropout: The share of probabilities that is dropped.
        is_causal: Whether a query sees only the keys up to its own position.
        scale: The factor of the scores; `None` for 1 / sqrt(head_dim).
        enable_gqa: Whether key and value may have fewer heads than query.

    Returns:
        Shape (samples, heads, queries, value_head_dim).
    """
    if backend is AttentionBackend.MATH:
        return _math(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype)
    if backend is AttentionBackend.FLASH:
        return _flash(query, key, value, dropout=dropout, is_causal=is_causal, scale=scale)
    if mask is not None:
        mask = _expanded_mask(mask, query, key, pads=backend is AttentionBackend.EFFICIENT)
    if backend is AttentionBackend.CUDNN:
        outputs = aten("_scaled_dot_product_cudnn_attention.default")(
            query, key, value, mask, True, dropout, is_causal, False, scale=scale
        )
    else:
        outputs = aten("_scaled_dot_product_efficient_attention.default")(
            query, key, value, mask, True, dropout, is_causal, scale=scale
        )
    output: torch.Tensor = outputs[0]
    return output


def _math(*args: Any, **kwargs: Any) -> torch.Tensor:
    # On the meta device PyTorch itself takes the math path.
    return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    dropout: float,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    head_dim = query.shape[-1]
    padding = -head_dim % _FLASH_ALIGNMENT
    if padding:
        scale = 1 / math.sqrt(head_dim) if scale is None else scale
        query, key, value = (
            torch.nn.functional.pad(tensor, (0, padding)) for tensor in (query, key, value)
        )
    output: torch.Tensor = aten("_scaled_dot_product_flash_attention.default")(
        query, key, value, dropout, is_causal, False, scale=scale
    )[0]
    return output[..., :head_dim] if padding else output


def _expanded_mask(
    mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *, pads: bool
) -> torch.Tensor:
    """Align the mask's rows for the memory-efficient kernel, then broadcast the mask as a view."""
    num_keys = key.shape[-2]
    if pads and any(stride % 8 for stride in mask.stride()[:-1]) and mask.shape[-1] == num_keys:
        mask = torch.nn.functional.pad(mask, (0, 8 - num_keys % 8))[..., :num_keys]
    return mask.expand(*query.shape[:-1], num_keys)
