"""Makes operations on the meta device do what they do on CUDA, while a step is traced.

This concerns the kernel of attention, recurrent layers, the mask of dropout, autocast, the scale of
the loss, and whether optimizers choose their foreach implementation.
`memfit.simulation.tracing.workspace` adds the memory that kernels take besides tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from memfit._torch_private import (
    capturable_supported_on,
    foreach_supported_on,
    fused_supported_on,
    run_backward,
)
from memfit.errors import NotSimulatedError
from memfit.records import Precision
from memfit.simulation.tracing.attention import (
    AttentionBackend,
    AttentionCall,
    attend,
    describe,
)
from memfit.simulation.tracing.autocast import CudaAutocast
from memfit.simulation.tracing.device_questions import answer_of_card, on_meta
from memfit.simulation.tracing.known_values import mapped
from memfit.simulation.tracing.recurrent import RECURRENT, is_padded, recur
from memfit.simulation.tracing.rms_norm import rms_norm

__all__ = ["META", "CudaSemantics", "MetaPrecision", "foreach_on_meta"]

META: Final = torch.device("meta")
# Classes of tensors that do not replace torch's functions.
_PLAIN: Final = frozenset((torch.Tensor, nn.Parameter, nn.Buffer))
_GETTER: Final = "__get__"
_AUTOCAST_DTYPES: Final = {
    Precision.AMP_BF16: torch.bfloat16,
    Precision.AMP_FP16: torch.float16,
}


class CudaSemantics(TorchFunctionMode):
    """Makes operations on the meta device do what they do on CUDA.

    Args:
        autocast: The casts, used if the precision is mixed or the model opens a region of autocast.
        choose_attention: A function that returns the kernel of an attention.
    """

    def __init__(
        self,
        autocast: CudaAutocast,
        choose_attention: Callable[[AttentionCall], AttentionBackend],
    ) -> None:
        super().__init__()
        self._autocast = autocast
        self._choose_attention = choose_attention
        self.attention: dict[AttentionCall, AttentionBackend] = {}
        self._told_of_card = False
        self._stand_ins: dict[str, Callable[..., Any]] = {
            "scaled_dot_product_attention": self._attend,
            "dropout": _dropout,
            "linear": _linear,
            "rms_norm": rms_norm,
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not _PLAIN.issuperset(types):
            args, kwargs = mapped(_plain, (args, kwargs))
        name = getattr(func, "__name__", "")
        if name == _GETTER:
            answer = answer_of_card(func, args)
            if answer is not None:
                self._told_of_card = True
                return answer
            return func(*args)
        if self._told_of_card:
            args, kwargs = mapped(on_meta, (args, kwargs))
        if kwargs.get("generator") is not None and _is_on_meta(args, kwargs):
            # The meta device has no generator, and draws no random numbers.
            kwargs = kwargs | {"generator": None}
        func = self._stand_ins.get(name, func)
        autocast = self._autocast if self._autocast.is_active else None
        if name in RECURRENT and is_padded(args):
            return recur(name, autocast is not None, *args)
        if autocast is not None:
            return autocast.call(func, name, args, kwargs)
        return func(*args, **kwargs)

    def _attend(  # noqa: PLR0917 - the signature of what it stands in for
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        call = describe(query, key, value, mask=attn_mask, dropout=dropout_p, is_causal=is_causal)
        backend = self._choose_attention(call)
        self.attention[call] = backend
        return attend(
            backend,
            query,
            key,
            value,
            mask=attn_mask,
            dropout=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )


def _plain(value: Any) -> Any:
    """Return a tensor of a subclass that replaces torch's functions as a plain tensor.

    Raises:
        NotSimulatedError: The class replaces torch's operations too.
    """
    if not isinstance(value, torch.Tensor) or type(value) in _PLAIN:
        return value
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise NotSimulatedError.because(
            "This step",
            (f"{type(value).__name__} has its own operations, and their memory is not known"),
        )
    if isinstance(value, nn.Parameter):
        return value
    return value.as_subclass(torch.Tensor)


def _is_on_meta(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device) == META
    return any(isinstance(value, torch.Tensor) and value.is_meta for value in args)


def _dropout(input: torch.Tensor, p: float = 0.5, train: bool = True) -> torch.Tensor:  # noqa: A002
    """Run dropout like CUDA's fused kernel, with a mask of booleans.

    Source: aten/src/ATen/native/Dropout.cpp.
    """
    if train and 0 < p < 1 and input.numel():
        return torch.native_dropout(input, p, train)[0]
    return torch.dropout(input, p, train)


def _linear(
    input: torch.Tensor,  # noqa: A002 - the name in torch
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply, and add a bias in place where no kernel does both.

    Under a dispatch mode, torch adds to a new tensor there.

    Source: `linear` in aten/src/ATen/native/Linear.cpp (isTensorSubclassLike).
    """
    if bias is None or input.ndim == 2 or input.is_contiguous():  # noqa: PLR2004 - a matrix
        return nn.functional.linear(input, weight, bias)
    return torch.matmul(input, weight.t()).add_(bias)


class MetaPrecision:
    """Autocast and GradScaler for meta tensors.

    Args:
        precision: The precision of the step.
        caches: Whether autocast keeps its casts of weights until the pass ends.
    """

    def __init__(self, precision: Precision, *, caches: bool = True) -> None:
        dtype = _AUTOCAST_DTYPES.get(precision)
        self._is_mixed = dtype is not None
        # The type that torch casts to on CUDA by default.
        self.autocast = CudaAutocast(dtype or torch.float16, caches=caches)
        self._scales = precision is Precision.AMP_FP16
        self._scaler: tuple[torch.Tensor, ...] = ()

    def begin(self) -> None:
        """Start as a training does, with a new GradScaler."""
        self._scaler = ()

    @property
    def kept(self) -> tuple[torch.Tensor, ...]:
        """What a GradScaler keeps from its first iteration on."""
        return self._scaler

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Run the model and the loss in this context."""
        if not self._is_mixed:
            yield
            return
        with self.autocast.forward():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Run backward from the loss. The loss is scaled if the precision needs it."""
        if self._scales:
            if not self._scaler:
                # The scale, and the number of steps since it last changed.
                types = torch.float32, torch.int32
                self._scaler = tuple(torch.full((), 1, dtype=kind, device=META) for kind in types)
            scaled = loss * self._scaler[0]
        else:
            scaled = loss
        with self.autocast.backward() if self._is_mixed else contextlib.nullcontext():
            run_backward(scaled, torch.ones_like(scaled))
        # It is gone before the loss, which lives as long as the caller's.
        del scaled

    def step(self, optimizer: Optimizer) -> None:
        """Take the optimizer's step. A GradScaler looks for infinite gradients before.

        Source: `unscale_` and `step` in torch/amp/grad_scaler.py.
        """
        if not self._scaler:
            optimizer.step()
            return
        inverse = self._scaler[0].double().reciprocal().float()
        found_infinite = torch.full((), 0.0, device=META)
        # Each device that has gradients gets a copy of both. That of the second is there until the
        # scale has been updated, after the step.
        found_on_device, inverse_on_device = found_infinite.clone(), inverse.clone()
        del inverse_on_device, inverse, found_infinite
        optimizer.step()
        del found_on_device


@contextlib.contextmanager
def foreach_on_meta(*, enabled: bool) -> Iterator[None]:
    """Make optimizers choose the same implementation for meta tensors as on CUDA.

    Args:
        enabled: Optimizers use the foreach implementation by default, and the fused one if the user
            asked for it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(fused_supported_on(META.type))
        stack.enter_context(capturable_supported_on(META.type))
        if enabled:
            stack.enter_context(foreach_supported_on(META.type))
        yield
