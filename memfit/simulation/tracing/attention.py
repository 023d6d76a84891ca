"""Which kernel `scaled_dot_product_attention` uses on a card, and what it keeps for backward.

The fused kernels (flash, memory-efficient, cuDNN's) save their output and one log-sum-exp for each
row. The math path saves the matrix of probabilities. The kernel is chosen by the conditions of
PyTorch 2.8 and later.

Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (order and gates),
    aten/src/ATen/native/transformers/attention.cpp (padding of head dimensions and masks). What
    torch 2.8, 2.11, 2.12, 2.14 and 2.15 choose on six rehearsed cards was laid beside it.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any, Final

import torch

from memfit._torch_private import aten, dispatched
from memfit.simulation.tracing.releases import cudnn_version, torch_release

__all__ = ["AttentionBackend", "AttentionBuild", "AttentionCall", "attend", "choose", "describe"]


class AttentionBackend(enum.Enum):
    """The kernels of `scaled_dot_product_attention`."""

    FLASH = "flash"
    EFFICIENT = "efficient"
    CUDNN = "cudnn"
    MATH = "math"


_FLASH_MAX_HEAD_DIM = 256
_FLASH_ALIGNMENT = 8
_FUSED_TYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
_HOPPER: Final = 9
# The compute capabilities (9.0 and 10.x) for which torch tries cuDNN first, the release since which
# it does so, and the version after which cuDNN has to be.
_PREFERS_CUDNN: Final = (_HOPPER, 10)
_PREFERS_CUDNN_SINCE: Final = (2, 11)
_PREFERRED_CUDNN: Final = 91500
# Since this release, cuDNN drops only multiples of a sixteenth (pytorch/pytorch#174245).
_ROUNDS_DROPOUT_SINCE: Final = (2, 12)
_WIDE_HEADS_SINCE: Final = (2, 14)
_WIDE_HEADS_CUDNN: Final = 92200
# Since this release, memory-efficient attention takes heads that share keys. Torch 2.13 was not
# seen with CUDA.
_EFFICIENT_GROUPS_SINCE: Final = (2, 14)
_SWITCHES: Final[tuple[tuple[AttentionBackend, Callable[[], bool]], ...]] = (
    (AttentionBackend.FLASH, torch.backends.cuda.flash_sdp_enabled),
    (AttentionBackend.EFFICIENT, torch.backends.cuda.mem_efficient_sdp_enabled),
    (AttentionBackend.CUDNN, torch.backends.cuda.cudnn_sdp_enabled),
    (AttentionBackend.MATH, torch.backends.cuda.math_sdp_enabled),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBuild:
    """What the choice of a kernel depends on besides the call and the card.

    Args:
        torch_release: The major and minor version of torch.
        cudnn_version: The version of cuDNN, such as 92600. `None` stands for the one that a CUDA
            build of that torch brings along.
        is_deterministic: Whether torch refuses kernels that are not deterministic.
    """

    torch_release: tuple[int, int]
    cudnn_version: int | None = None
    is_deterministic: bool = False

    @classmethod
    def current(cls) -> AttentionBuild:
        """Return that of this process."""
        warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
        return cls(
            torch_release=torch_release(),
            cudnn_version=cudnn_version(),
            is_deterministic=torch.are_deterministic_algorithms_enabled() and not warns_only,
        )

    def has_cudnn_after(self, version: int) -> bool:
        """Whether cuDNN is newer than a version."""
        return self.cudnn_version is None or self.cudnn_version > version


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """What the choice of a kernel depends on, besides the card.

    Args:
        dtype: The type of query, key and value.
        head_dim: The head dimension of query and key.
        value_head_dim: The head dimension of value.
        has_mask: Whether a mask or a bias is given.
        is_grouped: Whether key and value have fewer heads than query.
        dropout: The share of probabilities that is dropped.
        is_cross_causal: Whether attention is causal and the numbers of queries and keys differ.
        learns_mask: Whether the bias gets a gradient, which cuDNN's kernel does not give.
        needs_gradient: Whether query, key or value gets a gradient.
        has_one_query: Whether there is a single query.
        has_one_key: Whether there is a single key.
        refused: The kernels that the user switched off, as `torch.nn.attention.sdpa_kernel` does.
    """

    dtype: torch.dtype
    head_dim: int
    value_head_dim: int
    has_mask: bool = False
    is_grouped: bool = False
    dropout: float = 0.0
    is_cross_causal: bool = False
    learns_mask: bool = False
    needs_gradient: bool = True
    has_one_query: bool = False
    has_one_key: bool = False
    refused: frozenset[AttentionBackend] = frozenset()

    @property
    def is_half(self) -> bool:
        """Whether it computes in half precision."""
        return self.dtype in (torch.float16, torch.bfloat16)

    @property
    def head_dims(self) -> tuple[int, int]:
        """The head dimensions of query and value."""
        return self.head_dim, self.value_head_dim


def choose(
    call: AttentionCall, compute_capability: tuple[int, int], build: AttentionBuild
) -> AttentionBackend:
    """Return the kernel that a card uses.

    Args:
        call: The attention.
        compute_capability: The compute capability of the card, such as (8, 6).
        build: What torch it is.

    Raises:
        RuntimeError: torch would take none, because the user switched off all that can.
    """
    major, minor = compute_capability
    gates: list[tuple[AttentionBackend, Callable[[], bool]]] = [
        (AttentionBackend.FLASH, lambda: _flash_takes(call, major, minor)),
        (AttentionBackend.EFFICIENT, lambda: _efficient_takes(call, major, build)),
        (AttentionBackend.MATH, lambda: True),
    ]
    if call.head_dim == 0 or call.dtype not in _FUSED_TYPES:
        gates = gates[-1:]
    else:
        # cuDNN's kernel is tried first or last.
        at = 0 if _prefers_cudnn(major, build) else len(gates)
        gates.insert(at, (AttentionBackend.CUDNN, lambda: _cudnn_takes(call, major, build)))
    for backend, takes in gates:
        if backend not in call.refused and takes():
            return backend
    raise RuntimeError("No available kernel. Aborting execution.")


def _prefers_cudnn(major: int, build: AttentionBuild) -> bool:
    return (
        major in _PREFERS_CUDNN
        and build.torch_release >= _PREFERS_CUDNN_SINCE
        and build.has_cudnn_after(_PREFERRED_CUDNN)
    )


def _cudnn_takes(call: AttentionCall, major: int, build: AttentionBuild) -> bool:
    if major < 8 or build.is_deterministic:  # noqa: PLR2004 - Ampere
        return False
    if not call.is_half or call.learns_mask or call.has_one_key:
        return False
    if call.dropout and call.has_one_query:
        return False
    if build.torch_release >= _ROUNDS_DROPOUT_SINCE and call.dropout * 16 % 1:
        return False
    return not any(dim % 8 for dim in call.head_dims) and _cudnn_takes_head(call, major, build)


def _cudnn_takes_head(call: AttentionCall, major: int, build: AttentionBuild) -> bool:
    if max(call.head_dims) <= 128:  # noqa: PLR2004 - cuDNN's limit without exceptions
        return True
    if major not in _PREFERS_CUDNN:
        return False
    if build.torch_release >= _WIDE_HEADS_SINCE and build.has_cudnn_after(_WIDE_HEADS_CUDNN):
        trains = call.head_dims in ((192, 128), (256, 256))
        return max(call.head_dims) <= 256 and (trains or not call.needs_gradient)  # noqa: PLR2004
    if major == _HOPPER:
        return max(call.head_dims) <= 256  # noqa: PLR2004
    return call.head_dims == (192, 128)


def _flash_takes(call: AttentionCall, major: int, minor: int) -> bool:
    if major < 8 or not call.is_half or call.has_mask or call.is_cross_causal:  # noqa: PLR2004
        return False
    if call.head_dim != call.value_head_dim or call.head_dim > _FLASH_MAX_HEAD_DIM:
        return False
    is_small_chip = (major == 8 and minor in (6, 7, 9)) or major == 12  # noqa: PLR2004
    if not (is_small_chip and call.needs_gradient):
        return True
    padded = math.ceil(call.head_dim / _FLASH_ALIGNMENT) * _FLASH_ALIGNMENT
    return not (192 < padded <= 224 or (padded > 224 and call.dropout > 0))  # noqa: PLR2004


def _efficient_takes(call: AttentionCall, major: int, build: AttentionBuild) -> bool:
    if major < 5:  # noqa: PLR2004 - Maxwell
        return False
    if call.is_grouped and build.torch_release < _EFFICIENT_GROUPS_SINCE:
        return False
    if call.dtype is torch.bfloat16 and major < 8:  # noqa: PLR2004
        return False
    if major >= 8:  # noqa: PLR2004
        alignment = 8 if call.is_half else 4
    elif major == 7:  # noqa: PLR2004
        alignment = 8 if call.is_half else 1
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
        dropout=dropout,
        is_cross_causal=is_causal and query.shape[-2] != key.shape[-2],
        learns_mask=mask is not None and mask.requires_grad,
        needs_gradient=_needs_gradient(query, key, value),
        has_one_query=query.shape[-2] == 1,
        has_one_key=key.shape[-2] == 1,
        refused=frozenset(backend for backend, is_on in _SWITCHES if not is_on()),
    )


def _needs_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


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
    saves = _needs_gradient(query, key, value)
    if backend is AttentionBackend.CUDNN:
        run = aten("_scaled_dot_product_cudnn_attention.default")
        outputs = [*run(query, key, value, mask, saves, dropout, is_causal, False, scale=scale)]
    else:
        run = aten("_scaled_dot_product_efficient_attention.default")
        outputs = [*run(query, key, value, mask, saves, dropout, is_causal, scale=scale)]
    return _output_of(outputs)


def _output_of(outputs: list[Any]) -> torch.Tensor:
    """Return the first output, and give the others back in the order in which torch does."""
    output: torch.Tensor = outputs[0]
    while outputs:
        del outputs[0]
    return output


def _math(*args: Any, **kwargs: Any) -> torch.Tensor:
    # On the meta device PyTorch itself takes the math path. What is kept of dropout is four times
    # as large there.
    with dispatched(_add_in_place):
        return torch.nn.functional.scaled_dot_product_attention(*args, **kwargs)


def _add_in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Add the mask to the scores in place, which PyTorch does unless something watches it."""
    return (aten("add_.Tensor") if func is aten("add.Tensor") else func)(*args, **kwargs)


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
    run = aten("_scaled_dot_product_flash_attention.default")
    output = _output_of([*run(query, key, value, dropout, is_causal, False, scale=scale)])
    return output[..., :head_dim] if padding else output


def _expanded_mask(
    mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *, pads: bool
) -> torch.Tensor:
    """Align the mask's rows for the memory-efficient kernel, then broadcast the mask as a view."""
    num_keys = key.shape[-2]
    if pads and any(stride % 8 for stride in mask.stride()[:-1]) and mask.shape[-1] == num_keys:
        mask = torch.nn.functional.pad(mask, (0, 8 - num_keys % 8))[..., :num_keys]
    return mask.expand(*query.shape[:-1], num_keys)
