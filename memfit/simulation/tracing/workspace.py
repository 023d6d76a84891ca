"""The memory that kernels take from the allocator besides the tensors that an operation returns.

Every term has a name and a source. No term is fitted to a model. Convolutions and recurrent layers
are here. `memfit.simulation.tracing.scratch` has the other operations.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import torch

from memfit._torch_private import aten_if_there
from memfit.simulation.cudnn.needs import bound_need, workspace_need
from memfit.simulation.cudnn.questions import ConvolutionKernel
from memfit.simulation.needs import Need
from memfit.simulation.tracing.attention_scratch import (
    RANDOM_STATE_ON_GPU,
    cudnn_outputs,
    with_state_on_host,
)
from memfit.simulation.tracing.by_operation import once_per_operation
from memfit.simulation.tracing.convolution_calls import ConvolutionCall
from memfit.simulation.tracing.convolutions import (
    backward_outputs,
    backward_script,
    forward_script,
    layout_of,
)
from memfit.simulation.tracing.outputs import outputs
from memfit.simulation.tracing.recurrent import (
    on_cuda,
    recur_backward,
    recurrent_backward_script,
    recurrent_script,
)
from memfit.simulation.tracing.releases import torch_release
from memfit.simulation.tracing.scratch import scratch_of
from memfit.simulation.tracing.scripts import ALONE, Script, Workspace

__all__ = ["Kernels", "Workspace"]

_HANDLED: Final = (
    "convolution",
    "convolution_backward",
    "_cudnn_rnn",
    "_cudnn_rnn_backward",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
)
_TENSOR_CORES_HALF: Final = (7, 0)
_TENSOR_CORES_TF32: Final = (8, 0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """The kernels of a card and its libraries.

    Args:
        compute_capability: The compute capability of the card, such as (8, 6).
        allows_tf32: Whether fp32 convolutions may use tensor cores, which is PyTorch's default.
        torch_release: The major and minor version of torch.
        asks_cudnn: Whether the workspaces of convolutions are asked of the installed cuDNN. If not,
            or where it cannot be asked, they are bounds.
        is_quick: Workspaces are what they are where cuDNN cannot be asked.
    """

    compute_capability: tuple[int, int]
    allows_tf32: bool = True
    torch_release: tuple[int, int] = dataclasses.field(default_factory=torch_release)
    asks_cudnn: bool = True
    is_quick: bool = False

    def like(self, other: Kernels, *, has_tf32: bool = True) -> bool:
        """Whether the two take the same workspaces.

        Args:
            other: The kernels of another card.
            has_tf32: Whether a step has convolutions for which TF32 matters (`has_tf32`).
        """
        half, tf32 = zip(self._tensor_cores, other._tensor_cores, strict=True)
        return half[0] == half[1] and (not has_tf32 or tf32[0] == tf32[1])

    @property
    def _tensor_cores(self) -> tuple[bool, bool]:
        """Whether tensor cores are used for half precision, and whether for fp32 as TF32."""
        return (
            self.compute_capability >= _TENSOR_CORES_HALF,
            self.allows_tf32 and self.compute_capability >= _TENSOR_CORES_TF32,
        )

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and give its outputs the layout that they have on CUDA."""
        name = _own_name(func)
        if name is None:
            return outputs(func, args, kwargs)
        if name == "convolution_backward":
            return backward_outputs(args[1], args[2], args[3], args[-1])
        if name == "convolution":
            # The meta device does not always choose the layout that cuDNN computes in.
            result = func(*args, **kwargs)
            return torch.empty_like(result, memory_format=layout_of(args[0], args[1]))
        if name == "_cudnn_rnn":
            return on_cuda(args, func(*args, **kwargs))
        if name == "_cudnn_rnn_backward":
            return recur_backward(args)
        if name == "_scaled_dot_product_cudnn_attention":
            return cudnn_outputs(outputs(func, args, kwargs), saves=args[4])
        has_dropout = any(args[5:6])
        if self.torch_release < RANDOM_STATE_ON_GPU or has_dropout:
            return with_state_on_host(func(*args, **kwargs))
        return outputs(func, args, kwargs)

    def script(self, func: Any, args: tuple[Any, ...], result: Any) -> Script:
        """Return what an operation takes and gives back, in order.

        Args:
            func: The operation.
            args: Its positional arguments.
            result: The result of the operation.
        """
        known = scratch_of(func)
        if known is not None:
            return known(self, args, result)
        name = _own_name(func)
        if name == "convolution":
            return forward_script(args, result, self._convolution)
        if name == "convolution_backward":
            return backward_script(args, result, self._convolution)
        if name == "_cudnn_rnn":
            return recurrent_script(args)
        if name == "_cudnn_rnn_backward":
            return recurrent_backward_script(args)
        return ALONE

    def _convolution(
        self, kernel: ConvolutionKernel, tensors: tuple[torch.Tensor, ...], parameters: Any
    ) -> Workspace:
        """Return the workspace of a convolution's kernel: what to ask cuDNN, or the bound.

        Args:
            kernel: Which of the three kernels.
            tensors: Input, weight and output, or the gradients in their place.
            parameters: Stride, padding, dilation, whether transposed, output padding, groups.
        """
        data, weight, output = tensors
        call = ConvolutionCall(kernel, data, weight, output, tuple(parameters))
        half, tf32 = self._tensor_cores
        transposes = call.transposes(half=half, tf32=tf32)
        is_tf32 = call.transposes(half=half, tf32=True) != call.transposes(half=half, tf32=False)
        need, tried = self._needs(call, transposes=transposes)
        return Workspace(
            name="convolution",
            is_needed=False,
            plan=call.plan_key,
            need=need,
            tried=tried,
            is_tf32=is_tf32,
        )

    def _needs(self, call: ConvolutionCall, *, transposes: bool) -> tuple[Need | None, Need | None]:
        """Return what a convolution asks for, and what the trial of its plans asks for."""
        question = call.question()
        if question is None:
            return None, None
        element_bytes = call.data.element_size() if transposes else 0
        if not self.asks_cudnn:
            bound = bound_need(question, bytes_per_element=element_bytes) if transposes else None
            return bound, None
        shapes = question.input_shape, question.weight_shape
        if self.is_quick and not transposes and not question.product_bytes(*shapes):
            # What is not asked of cuDNN grows evenly, so what is nothing here is nothing at all.
            # Without a need for it, replays have half as much to look up.
            return None, None
        need = workspace_need(
            question, bound_bytes_per_element=element_bytes, is_quick=self.is_quick
        )
        if self.is_quick:
            return need, None
        tried = dataclasses.replace(question, tries_plans=True)
        return need, workspace_need(tried, bound_bytes_per_element=0)


@once_per_operation
def _own_name(func: Any) -> str | None:
    """Return the name of an operation that is handled here; `None` for all others."""
    return next((name for name in _HANDLED if func is aten_if_there(f"{name}.default")), None)
