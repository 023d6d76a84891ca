"""A convolution as cuDNN sees it: what decides which plan it takes, and so its workspace."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Final

__all__ = ["Convolution", "ConvolutionKernel"]

_NUM_DIMS: Final = 4  # (N, C, H, W)
_HALF: Final = frozenset({"bfloat16", "float16"})
_FEW_CHANNELS: Final = 32
_MOST_PRODUCTS: Final = 3  # times the bytes of input and output
_FLOAT_BYTES: Final = 4


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

    def product_bytes(
        self, input_shape: tuple[int, ...], weight_shape: tuple[int, ...]
    ) -> int | None:
        """Return the workspace of the convolution as cuBLASLt's product of matrices.

        On a real device, cuDNN has engines that call cuBLASLt, and puts them first for most 1x1
        convolutions of NCHW tensors. They are not in the list for a card that is only described.
        Forward and the input's gradient need no workspace. The weight's gradient keeps one product
        for each sample, in fp32, and sums them. Where the products are many times the tensors, or
        an fp32 input has few channels, another engine does it.

        Source: lists of plans and workspaces of cuDNN 9.19 on an H100
            (benchmarks/data/h100-convolutions.csv). Which engine comes first is cuDNN's secret:
            the two limits for the weight's gradient are read off that file. On it, torch's
            workspace is right up to 400 bytes for 89% of 2,340 kernels of 1x1 convolutions, and
            without this rule for 22%. What is wrong are mostly images of 7x7.

        Args:
            input_shape: The shape of the input, in place of the convolution's own. A search asks
                for many, and a changed copy of the convolution would take longer.
            weight_shape: The shape of the weight, likewise.

        Returns:
            Bytes; `None` if cuDNN takes another engine.
        """
        is_pointwise = (
            not self.is_channels_last
            and len(input_shape) == _NUM_DIMS
            and not any(self.padding)
            and set(weight_shape[2:]) == set(self.stride) == {1}
            and weight_shape[1] == input_shape[1]
        )
        pixels = math.prod(input_shape[2:])
        if not is_pointwise or pixels == 1:
            return None
        samples, channels = input_shape[:2]
        if self.kernel is ConvolutionKernel.FILTER:
            num_bytes = samples * math.prod(weight_shape) * _FLOAT_BYTES
            element_bytes = 2 if self.dtype in _HALF else _FLOAT_BYTES
            tensors = samples * pixels * (channels + weight_shape[0]) * element_bytes
            is_cheap = num_bytes <= _MOST_PRODUCTS * tensors
            is_wide = self.dtype in _HALF or channels > _FEW_CHANNELS
            return num_bytes if is_cheap and is_wide else None
        # Tensor cores read two halves at a time, and rows of an odd length do not begin there.
        is_odd = self.dtype in _HALF and pixels % 2 == 1
        return None if is_odd and self.kernel is ConvolutionKernel.FORWARD else 0

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
