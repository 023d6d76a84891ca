"""A convolution as cuDNN sees it: what decides which plan it takes, and so its workspace."""

from __future__ import annotations

import dataclasses
import enum

__all__ = ["Convolution", "ConvolutionKernel"]


class ConvolutionKernel(str, enum.Enum):
    """Which of a convolution's three kernels runs."""

    FORWARD = "forward"
    DATA = "data"
    FILTER = "filter"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Convolution:
    """One kernel of a convolution, at one batch size.

    A transposed convolution is the data kernel of a convolution, so there is no field for it.

    Args:
        kernel: Forward, or the gradient of the input (`DATA`) or of the weight (`FILTER`).
        dtype: The type of its tensors, such as "bfloat16".
        is_channels_last: Whether its tensors lie in NHWC (NDHWC) instead of NCHW (NCDHW).
        input_shape: (N, C, spatial ...).
        weight_shape: (K, C / groups, spatial ...).
        output_shape: (N, K, spatial ...).
        padding: For each spatial dimension.
        stride: For each spatial dimension.
        dilation: For each spatial dimension.
        tries_plans: It asks for the largest workspace of the plans that `cudnn.benchmark` tries,
            and not for the workspace of the plan that is taken.
        rank: Which plan is meant: 0 for the first of the heuristics that can be built. torch goes
            on to the next one where a workspace finds no room.
    """

    kernel: ConvolutionKernel
    dtype: str
    is_channels_last: bool
    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    padding: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    tries_plans: bool = False
    rank: int = 0

    @property
    def text(self) -> str:
        """All fields, as a key for a file of answers."""
        lists = (
            self.input_shape,
            self.weight_shape,
            self.output_shape,
            self.padding,
            self.stride,
            self.dilation,
        )
        layout = "last" if self.is_channels_last else "first"
        sizes = " ".join("x".join(map(str, numbers)) for numbers in lists)
        tried = " tried" if self.tries_plans else ""
        rank = f" plan {self.rank}" if self.rank else ""
        return f"{self.kernel.value} {self.dtype} {layout} {sizes}{tried}{rank}"
