"""Decides whether an exception means out of memory: certainly, possibly, or not.

Only this module decides it. It reads types and messages only. To confirm a suspicion takes another
trial, which the backends run.
"""

from __future__ import annotations

import enum
import errno
import sys
from typing import Final

__all__ = [
    "NEVER_MEMORY",
    "SIGNATURES",
    "SIZE_LIMITS",
    "Likelihood",
    "classify",
    "classify_text",
    "first_line",
    "is_size_limit",
]


class Likelihood(enum.Enum):
    """What an exception says about memory."""

    CERTAIN = "certain"
    SUSPECTED = "suspected"
    NO = "no"


SIGNATURES: Final[tuple[tuple[str, Likelihood], ...]] = (
    # Messages of the caching allocators (c10/cuda/CUDACachingAllocator.cpp and similar files).
    # The second and third are `cudaMallocAsync`'s (CUDAMallocAsyncAllocator.cpp). With torch 2.8
    # its message ends after the third, because the index 0 is printed as a character.
    ("CUDA out of memory.", Likelihood.CERTAIN),
    ("would exceed allowed memory. (out of memory)", Likelihood.CERTAIN),
    ("Allocation on device ", Likelihood.CERTAIN),
    ("HIP out of memory.", Likelihood.CERTAIN),
    ("XPU out of memory.", Likelihood.CERTAIN),
    ("MPS backend out of memory (", Likelihood.CERTAIN),
    # Messages of the driver, when memory is requested without the caching allocator.
    ("CUDA error: out of memory", Likelihood.CERTAIN),
    ("HIP error: out of memory", Likelihood.CERTAIN),
    ("CUDA ran out of memory outside PyTorch's allocator", Likelihood.CERTAIN),
    ("UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY", Likelihood.CERTAIN),
    ("MODULE:PT_DEVMEM Allocation failed", Likelihood.CERTAIN),
    # Messages of the CPU's allocator (c10/core/impl/alloc_cpu.cpp). The second is for Windows.
    ("DefaultCPUAllocator: can't allocate memory", Likelihood.CERTAIN),
    ("DefaultCPUAllocator: not enough memory", Likelihood.CERTAIN),
    ("std::bad_alloc", Likelihood.CERTAIN),
    # Libraries that use the same message for a failed allocation and for a limit of their own.
    ("CUBLAS_STATUS_ALLOC_FAILED", Likelihood.SUSPECTED),
    ("CUBLAS_STATUS_NOT_INITIALIZED", Likelihood.SUSPECTED),
    ("CUDNN_STATUS_ALLOC_FAILED", Likelihood.SUSPECTED),
    ("CUDNN_STATUS_INTERNAL_ERROR", Likelihood.SUSPECTED),
    ("CUDNN_STATUS_NOT_SUPPORTED", Likelihood.SUSPECTED),
    ("GET was unable to find an engine", Likelihood.SUSPECTED),
    ("FIND was unable to find an engine", Likelihood.SUSPECTED),
    ("could not create a primitive", Likelihood.SUSPECTED),
    ("could not execute a primitive", Likelihood.SUSPECTED),
)
"""Parts of messages, and what each one says about memory. The first match counts.

Source: pytorch/pytorch's allocators and issues #2917, #49207; oneDNN's status texts.
"""

NEVER_MEMORY: Final[tuple[str, ...]] = (
    "illegal memory access",
    "device-side assert triggered",
    "required rank",
)
"""Errors that a smaller batch does not cure: the device's context or the code is broken.

Source: pytorch/pytorch#81620.
"""


SIZE_LIMITS: Final[tuple[str, ...]] = (
    "invalid configuration argument",
    "canUse32BitIndexMath",
    "INT_MAX",
    "without overflow",
)
"""Errors of operators that take only so many samples or elements, however much memory is free.

A kernel's grid ends at 65,535 in two of its dimensions, and some kernels index with 32 bits.

Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability";
    pytorch/pytorch#142228 and #146704 (attention), #141789 (32 bits).
"""


def classify(error: BaseException) -> Likelihood:
    """Say whether an exception means that memory ran out.

    If the exception was raised `from` another one, that one is read too. So an out of memory is
    recognised even if the user's code wraps it in another error.

    Args:
        error: The exception.

    Returns:
        `CERTAIN`, `SUSPECTED` (another trial must confirm it), or `NO` (an error of the user's
        code).
    """
    verdicts = [_classify_one(link) for link in _causes(error)]
    if any(text in str(link) for link in _causes(error) for text in NEVER_MEMORY):
        return Likelihood.NO
    return min(verdicts, key=list(Likelihood).index)


def classify_text(text: str) -> Likelihood:
    """Say whether a message, such as the last line of a dead process, means out of memory."""
    if any(never in text for never in NEVER_MEMORY):
        return Likelihood.NO
    return next((verdict for part, verdict in SIGNATURES if part in text), Likelihood.NO)


def is_size_limit(error: BaseException) -> bool:
    """Say whether an operator refused the size of a tensor, and not memory ran out."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in SIZE_LIMITS)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if it has no message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "") or (
        type(error).__name__
    )


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while chain[-1].__cause__ is not None and chain[-1].__cause__ not in chain:
        chain.append(chain[-1].__cause__)
    return chain


def _classify_one(error: BaseException) -> Likelihood:
    if isinstance(error, MemoryError):
        return Likelihood.CERTAIN
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return Likelihood.CERTAIN
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return Likelihood.CERTAIN
    if isinstance(error, RuntimeError):
        return classify_text(str(error))
    return Likelihood.NO
