"""What timm's inference benchmark and its releases of torch did, and a step of memfit's does not.

The benchmark steps down its ladder on any error. So a row can end at a batch size that an operator
of that torch refuses, however much memory is free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from ladders import made_once
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.backends.traces import TraceCache, Traced, trace, trace_options
from memfit.cards import Gpu
from memfit.simulation.tracing.autocast import CudaAutocast
from memfit.simulation.tracing.autocast_regions import regions_followed
from memfit.simulation.tracing.convolutions import is_depthwise
from memfit.step.training_step import TrainingStep

__all__ = ["InHalf", "InputsMadeOnce", "Refusal", "refusals_of"]

# CUDA's limit on the second and third dimension of a grid. Both attention kernels count samples
# there (pytorch/pytorch#146704).
_MOST_ATTENTIONS = 65_535
# The memory-efficient kernel runs in chunks since then (pytorch/pytorch#154029).
_EFFICIENT_IN_CHUNKS = (2, 8)
# torch's own depthwise kernels index with 32 bits. Since then, cuDNN gets what is larger
# (pytorch/pytorch#152816, #153101).
_MOST_ELEMENTS = 2**31 - 2
_LARGE_TO_CUDNN = (2, 8)
# In NHWC, torch 2.9 keeps large depthwise inputs from cuDNN 9.10 to 9.14 (pytorch/pytorch#163171).
# Later releases bring cuDNN 9.15, and give them to it (#168364).
_LARGE_NHWC_REFUSED = (2, 9)


@dataclasses.dataclass(frozen=True)
class InHalf:
    """What computes in half precision where it could compute in fp32.

    Args:
        norms: The norms of models made from now on (`--fast-norm` of timm's benchmark).
        scores: Attention that no fused kernel takes, as samvit's of three dimensions. Torch 2.5 and
            later computes it in fp32.
    """

    norms: bool
    scores: bool

    def set(self) -> None:
        """Switch both, in this process.

        An old timm gets the one function of a new one that memfit calls.
        """
        import timm.optim
        import torch

        if not hasattr(timm.optim, "list_optimizers"):
            timm.optim.list_optimizers = lambda *_, **__: ["adamw"]
        timm.layers.set_fast_norm(self.norms)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(self.scores)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An operator that fails with more than so many samples."""

    most_samples: int
    reason: str


def refusals_of(
    model: Any, image_size: int, *, is_last: bool, is_compiled: bool, release: str
) -> list[Refusal]:
    """Return the operators of a forward pass in amp-fp16 that fail with too many samples.

    Args:
        model: The model on the meta device.
        image_size: The pixels of a side.
        is_last: Whether it runs in channels-last.
        is_compiled: Whether it is compiled; then Inductor has convolutions in channels-last.
        release: The release of torch, such as "2.4.0".
    """
    version = tuple(map(int, release.split(".")[:2]))
    calls = _Calls()
    images = torch.randn(1, 3, image_size, image_size, device="meta")
    if is_last:
        images = images.contiguous(memory_format=torch.channels_last)
    # Only shapes count, so nothing is cast; but models ask for the autocast of their device.
    autocast = regions_followed(CudaAutocast(torch.half))
    with torch.no_grad(), autocast, calls, _Convolutions(calls):
        model.eval()(images)
    return [
        *_of_attention(calls, version),
        *_of_convolutions(calls, version, is_compiled=is_compiled),
    ]


def _of_attention(calls: _Calls, version: tuple[int, ...]) -> Iterator[Refusal]:
    for num_attentions, has_mask in calls.attentions:
        if not has_mask or version < _EFFICIENT_IN_CHUNKS:
            kernel = "memory-efficient" if has_mask else "flash"
            reason = f"{kernel} attention of more than 65,535 windows"
            yield Refusal(_MOST_ATTENTIONS // num_attentions, reason)


def _of_convolutions(
    calls: _Calls, version: tuple[int, ...], *, is_compiled: bool
) -> Iterator[Refusal]:
    for layout_there, shape, output, weight_shape, parameters in calls.convolutions:
        layout = torch.channels_last if is_compiled else layout_there
        if version < _LARGE_TO_CUDNN:
            data = torch.empty(64, *shape, dtype=torch.half, device="meta", memory_format=layout)
            weight = torch.empty(weight_shape, dtype=torch.half, device="meta")
            if is_depthwise(data, weight.contiguous(memory_format=layout), parameters):
                most = _MOST_ELEMENTS // max(shape.numel(), output.numel())
                yield Refusal(most, "a depthwise convolution of 2^31 elements")
            continue
        is_refused = version == _LARGE_NHWC_REFUSED and layout is torch.channels_last
        if is_refused and weight_shape[1] == 1:
            most = _MOST_ELEMENTS // shape.numel()
            yield Refusal(most, "a depthwise convolution in NHWC of 2^31 elements")


class _Calls(TorchFunctionMode):
    """Notes what decides, for one sample."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions: set[tuple[int, bool]] = set()
        self.convolutions: set[tuple[Any, ...]] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "scaled_dot_product_attention":
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")  # noqa: PLR2004
            self.attentions.add((args[0].shape[0], mask is not None))
        return func(*args, **kwargs)


class _Convolutions(TorchDispatchMode):
    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.convolution.default:
            return result
        # A norm over channels gives its output in channels-last, and convolutions keep it so.
        layout = suggest_memory_format(args[0])
        if args[8] > 1:
            parameters = tuple(
                tuple(value) if isinstance(value, list) else value for value in args[3:9]
            )
            shapes = args[0].shape[1:], result.shape[1:], args[1].shape
            self._calls.convolutions.add((layout, *shapes, parameters))
        return result.contiguous(memory_format=layout)


class InputsMadeOnce(TraceCache):
    """Traces in which the batch is there from the start, as in that benchmark (`made_once`)."""

    def find(self, step: TrainingStep, gpu: Gpu) -> Traced:
        """Return a trace that holds for a card, made now if there is none yet."""
        options = trace_options(gpu)
        for traced in self._traced:
            if traced.holds_for(step, options):
                return traced
        made = trace(step, options)
        is_last = step.options.channels_last
        made = dataclasses.replace(
            made,
            schedule=made_once(made.schedule, is_last=is_last),
            as_run=made_once(made.as_run, is_last=is_last),
        )
        self.add(step, options, made)
        return self._traced[-1]
