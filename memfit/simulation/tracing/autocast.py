"""CUDA's autocast for tensors on the meta device. PyTorch has no autocast for that device.

The policy is the same as on CUDA. Some operations run in the lower precision, some in fp32, and
some in the widest type of their arguments. The casts of leaf parameters are kept until autocast
ends. The policy is applied where Python calls an operation. A few operations call another operation
inside C++, so these are written out here (`_NESTED`). `memfit.simulation.tracing.autocast_regions`
handles regions that a model opens itself (`torch.autocast(enabled=False)`).

Source: torch/include/ATen/autocast_mode.h (the lists) and aten/src/ATen/autocast_mode.cpp (the
    cache: leaf, not a view, requires a gradient, fp32).
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from memfit._torch_private import aten, is_view

__all__ = [
    "FP32",
    "FP32_SET_OPT_DTYPE",
    "LOWER_PRECISION",
    "PROMOTE",
    "CudaAutocast",
    "keeps_casts_in_inference_mode",
]

LOWER_PRECISION: Final = frozenset(
    """_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d
    convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm
    chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell
    rnn_tanh_cell rnn_relu_cell _scaled_dot_product_flash_attention
    scaled_dot_product_attention""".split()  # noqa: SIM905 - as the macros have it
)
# pytorch/pytorch#174824.
_FP32_SINCE_2_12: Final = frozenset(("rms_norm",))
FP32: Final = frozenset(
    """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus
    layer_norm native_layer_norm group_norm frobenius_norm nuclear_norm cosine_similarity
    poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss
    smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm
    logsumexp upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d
    _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d
    upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d upsample_bicubic2d
    _upsample_bicubic2d_aa""".split()  # noqa: SIM905 - as the macros have it
) | (frozenset() if torch.__version__ < "2.12" else _FP32_SINCE_2_12)
FP32_SET_OPT_DTYPE: Final = frozenset(
    """prod softmax log_softmax cumprod cumsum linalg_vector_norm linalg_matrix_norm
    sum""".split()  # noqa: SIM905 - as the macros have it
)
PROMOTE: Final = frozenset(
    """addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot
    scatter_add""".split()  # noqa: SIM905 - as the macros have it
)

# Operations that have another name in Python than in C++.
_ALIASES: Final = {
    "__matmul__": "matmul",
    "__rmatmul__": "matmul",
    "__pow__": "pow",
    "__rpow__": "pow",
    "__ipow__": "pow",
    "multi_dot": "linalg_multi_dot",
    "vecdot": "linalg_vecdot",
    "vector_norm": "linalg_vector_norm",
    "matrix_norm": "linalg_matrix_norm",
    "norm": "linalg_vector_norm",
    "nll_loss_nd": "nll_loss",
    # at::square is at::pow(x, 2) in C++, where autocast sees it.
    "square": "pow",
}
_HALF_TO_FLOAT: Final = {"softmax": "_softmax.default", "log_softmax": "_log_softmax.default"}


@functools.cache
def keeps_casts_in_inference_mode() -> bool:
    """Whether this torch keeps the casts of weights until a pass in inference mode ends.

    torch 2.9 and older do, torch 2.11 and later do not. A weight that is changed between two
    products tells: a cast that was kept is the old weight's.
    """
    ones = torch.ones(1, 1)
    weight = torch.zeros(1, 1, requires_grad=True)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.mm(ones, weight)
        weight.fill_(1)
        return not torch.mm(ones, weight).item()


class CudaAutocast:
    """The casts of one training step.

    Args:
        dtype: The lower precision.
        caches: Whether casts of weights are kept until the pass ends. In inference mode it depends
            on torch's release (`keeps_casts_in_inference_mode`).
    """

    def __init__(self, dtype: torch.dtype, *, caches: bool = True) -> None:
        self._caches = caches
        self._dtype = dtype
        # The regions that the model has opened, the innermost last: whether it casts, and its type.
        self._regions: list[tuple[bool, torch.dtype]] = []
        self._is_entered = False
        self._is_backward = False
        self._cache: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        # A recomputed segment enters autocast again, so a cast lives only as long as the graph of
        # the segment.
        self._recomputed: weakref.WeakValueDictionary[tuple[int, torch.dtype], torch.Tensor] = (
            weakref.WeakValueDictionary()
        )

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Cast the operations in the block, and drop the kept casts afterwards."""
        self._is_entered = True
        try:
            yield
        finally:
            self._is_entered = False
            self._cache.clear()

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Cast the operations that gradient checkpointing computes again in backward."""
        self._is_backward = True
        try:
            yield
        finally:
            self._is_backward = False
            self._cache.clear()

    def open_region(self, dtype: torch.dtype | None, *, enabled: bool) -> None:
        """Enter a region that the model opens.

        Args:
            dtype: The type that the region casts to; `None` for the type of the region around it.
            enabled: Whether the region casts.
        """
        self._regions.append((enabled, dtype or self.dtype))

    def close_region(self) -> None:
        """Leave the innermost region. The casts are dropped when no region of autocast is left."""
        self._regions.pop()
        if not (self._regions or self._is_entered or self._is_backward):
            self._cache.clear()

    @property
    def dtype(self) -> torch.dtype:
        """The lower precision of the current region."""
        return self._regions[-1][1] if self._regions else self._dtype

    @property
    def is_active(self) -> bool:
        """Whether operations are cast now.

        In backward, gradients are enabled only during recomputation. For recomputation,
        checkpointing enters the autocast of forward again.
        """
        if self._regions:
            return self._regions[-1][0]
        return self._is_entered or (self._is_backward and torch.is_grad_enabled())

    def call(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call an operation as autocast would.

        Args:
            func: The function that Python called.
            name: Its `__name__`.
            args: Its positional arguments.
            kwargs: Its other arguments.
        """
        name = _ALIASES.get(name, name)
        if name in LOWER_PRECISION:
            return self._call_cast(func, args, kwargs, self.dtype)
        if name in FP32:
            return self._call_cast(func, args, kwargs, torch.float32)
        if name in FP32_SET_OPT_DTYPE:
            return self._call_in_fp32(func, name, args, kwargs)
        if name in PROMOTE:
            return self._call_cast(func, args, kwargs, self._widest((args, kwargs)))
        nested = _NESTED.get(name)
        return func(*args, **kwargs) if nested is None else nested(self, *args, **kwargs)

    def _call_in_fp32(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Let the operation compute in fp32 itself, unless its caller chose a type."""
        first: Any = args[0] if args else kwargs.get("input")
        if not _is_low(first) or kwargs.get("dtype") is not None:
            return func(*args, **kwargs)
        # For fp16, the CUDA kernel reads half and writes float. For bf16, the input is converted
        # first (at::softmax in aten/src/ATen/native/SoftMax.cpp).
        fused = _HALF_TO_FLOAT.get(name)
        if fused is not None and first.dtype is torch.float16:
            dim = kwargs["dim"] if "dim" in kwargs else args[1]
            return aten(fused)(first, dim % max(first.ndim, 1), True)
        return func(*args, **(kwargs | {"dtype": torch.float32}))

    def _call_cast(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dtype: torch.dtype,
    ) -> Any:
        """Cast all arguments, the last first, and call the operation.

        What Python passes one by one to `einsum`, it gets as one list, which is cast in order.

        Source: `WrapFunction_` in aten/src/ATen/autocast_mode.h passes a pack of casts to the
            operation, and the compilers of PyTorch's releases evaluate it from the right.
        """
        if func is torch.einsum:
            return func(*(self._cast_value(value, dtype) for value in args), **kwargs)
        named = {key: self._cast_value(kwargs[key], dtype) for key in reversed(kwargs)}
        cast = [self._cast_value(value, dtype) for value in reversed(args)]
        return func(*reversed(cast), **named)

    def _cast_value(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, torch.Tensor):
            return self._cast_tensor(value, dtype)
        if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
            return type(value)(self._cast_value(item, dtype) for item in value)
        return value

    def _cast_tensor(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not _is_eligible(tensor) or tensor.dtype is dtype:
            return tensor
        is_kept = (
            self._caches
            and dtype is self.dtype
            and tensor.dtype is torch.float32
            and tensor.is_leaf
            and tensor.requires_grad
            and not is_view(tensor)
        )
        if not is_kept:
            return tensor.to(dtype)
        is_recomputed = self._is_backward and not self._is_entered
        cache = self._recomputed if is_recomputed else self._cache
        cast = cache.get((id(tensor), dtype))
        if cast is None:
            cast = cache[id(tensor), dtype] = tensor.to(dtype)
        return cast

    def _widest(self, values: Any) -> torch.dtype:
        """Return the widest type among the eligible tensors."""
        found = [self.dtype]

        def look(value: Any) -> None:
            if isinstance(value, torch.Tensor):
                if _is_eligible(value):
                    found.append(value.dtype)
            elif isinstance(value, (list, tuple)):
                for item in value:
                    look(item)
            elif isinstance(value, dict):
                look(tuple(value.values()))

        look(values)
        return torch.float32 if torch.float32 in found else self.dtype


def _is_eligible(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.device.type == "meta"
        and value.is_floating_point()
        and value.dtype is not torch.float64
    )


def _is_low(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and _is_eligible(value)
        and value.dtype in (torch.float16, torch.bfloat16)
    )


def _cross_entropy(  # noqa: PLR0917 - the signature of what it stands in for
    autocast: CudaAutocast,
    scores: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    """Stand in for `at::cross_entropy_loss`, whose parts autocast casts one by one inside C++."""
    class_dim = 0 if scores.ndim == 1 else 1
    # `at::cross_entropy_loss` names the type of the logarithms, so autocast leaves it as it is.
    logs = aten("log_softmax.int")(scores, class_dim, scores.dtype)
    if target.is_floating_point():
        return _probability_loss(autocast, logs, (target, weight, reduction, label_smoothing))
    loss = autocast.call(
        aten("nll_loss_nd.default"),
        "nll_loss",
        (logs, target, weight, reduction, ignore_index),
        {},
    )
    if not label_smoothing:
        return loss
    spread = logs
    if weight is not None:
        spread = logs * weight.view((1, -1) + (1,) * (logs.ndim - 2) if logs.ndim > 1 else (-1,))
    smooth = -autocast.call(torch.sum, "sum", (spread, class_dim), {})
    ignored = target == ignore_index
    smooth = smooth.masked_fill_(ignored, 0.0)
    if reduction == 1:
        smooth = smooth.sum() / (~ignored).sum()
    elif reduction == 2:  # noqa: PLR2004 - at::Reduction::Sum
        smooth = smooth.sum()
    return loss * (1 - label_smoothing) + smooth * (label_smoothing / scores.shape[class_dim])


def _probability_loss(
    autocast: CudaAutocast,
    logs: torch.Tensor,
    options: tuple[torch.Tensor, torch.Tensor | None, int, float],
) -> torch.Tensor:
    """Return the loss of targets that are probabilities; `cross_entropy_loss_prob_target` in C++.

    Args:
        autocast: The casts.
        logs: The logarithms of the predicted probabilities.
        options: Target, weights of classes, reduction, and label smoothing.
    """
    target, weight, reduction, label_smoothing = options
    class_dim = 0 if logs.ndim == 1 else 1
    num_classes = logs.shape[class_dim]
    if label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / num_classes
    product = logs * target
    if weight is not None:
        product = product * weight.view(
            (1, -1) + (1,) * (logs.ndim - 2) if logs.ndim > 1 else (-1,)
        )
    if reduction == 0:
        return -autocast.call(torch.sum, "sum", (product, class_dim), {})  # type: ignore[no-any-return]
    total: torch.Tensor = -autocast.call(torch.sum, "sum", (product,), {})
    return total / (logs.numel() / num_classes) if reduction == 1 else total


_NESTED: Final[dict[str, Callable[..., Any]]] = {"cross_entropy_loss": _cross_entropy}


@contextlib.contextmanager
def functional_layer_open() -> Iterator[None]:
    """Let torch function modes see the operations that `torch.nn.functional` calls.

    Each function there asks whether an override exists, and then hands over the whole call. The
    operations inside it would then run unseen.
    """
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    kept = {name: getattr(F, name) for name in names}
    for name in names:
        setattr(F, name, _no_override)
    try:
        yield
    finally:
        for name, original in kept.items():
            setattr(F, name, original)


def _no_override(*_args: Any) -> bool:
    return False
