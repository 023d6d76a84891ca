"""Is this exception out of memory: certainly, possibly, or no.

The one place where that is decided. It reads types and messages only; confirming a suspicion takes
another trial and is the backends' work.
"""

from __future__ import annotations

import enum
import errno
import sys
from typing import Final

__all__ = ["NEVER_MEMORY", "SIGNATURES", "Verdict", "classify", "classify_text", "first_line"]


class Verdict(enum.Enum):
    """What an exception says about memory."""

    CERTAIN = "certain"
    SUSPECTED = "suspected"
    NO = "no"


SIGNATURES: Final[tuple[tuple[str, Verdict], ...]] = (
    # The caching allocators' own words (c10/cuda/CUDACachingAllocator.cpp and its siblings).
    ("CUDA out of memory.", Verdict.CERTAIN),
    ("HIP out of memory.", Verdict.CERTAIN),
    ("XPU out of memory.", Verdict.CERTAIN),
    ("MPS backend out of memory (", Verdict.CERTAIN),
    # The driver's, when something asks it past the caching allocator.
    ("CUDA error: out of memory", Verdict.CERTAIN),
    ("HIP error: out of memory", Verdict.CERTAIN),
    ("CUDA ran out of memory outside PyTorch's allocator", Verdict.CERTAIN),
    ("UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY", Verdict.CERTAIN),
    ("MODULE:PT_DEVMEM Allocation failed", Verdict.CERTAIN),
    # The CPU's (c10/core/impl/alloc_cpu.cpp); the second is what it says on Windows.
    ("DefaultCPUAllocator: can't allocate memory", Verdict.CERTAIN),
    ("DefaultCPUAllocator: not enough memory", Verdict.CERTAIN),
    ("std::bad_alloc", Verdict.CERTAIN),
    # Libraries that report a failed allocation and a real limit in the same words.
    ("CUBLAS_STATUS_ALLOC_FAILED", Verdict.SUSPECTED),
    ("CUBLAS_STATUS_NOT_INITIALIZED", Verdict.SUSPECTED),
    ("CUDNN_STATUS_ALLOC_FAILED", Verdict.SUSPECTED),
    ("CUDNN_STATUS_INTERNAL_ERROR", Verdict.SUSPECTED),
    ("CUDNN_STATUS_NOT_SUPPORTED", Verdict.SUSPECTED),
    ("GET was unable to find an engine", Verdict.SUSPECTED),
    ("FIND was unable to find an engine", Verdict.SUSPECTED),
    ("could not create a primitive", Verdict.SUSPECTED),
    ("could not execute a primitive", Verdict.SUSPECTED),
)
"""What messages contain, and what that says. The first match counts.

Source: pytorch/pytorch's allocators and issues #2917, #49207; oneDNN's status texts.
"""

NEVER_MEMORY: Final[tuple[str, ...]] = (
    "illegal memory access",
    "device-side assert",
    "required rank",
)
"""What no smaller batch cures: the device's context is poisoned, or the code is wrong.

Source: pytorch/pytorch#81620.
"""


def classify(error: BaseException) -> Verdict:
    """Say whether an exception means that memory ran out.

    An exception that was raised `from` another is judged by that one too, so that code which wraps
    an out-of-memory in an error of its own is still understood.

    Args:
        error: What was raised.

    Returns:
        `CERTAIN`, `SUSPECTED` (confirm it by another trial), or `NO` (the user's own error).
    """
    verdicts = [_classify_one(link) for link in _causes(error)]
    if any(text in str(link) for link in _causes(error) for text in NEVER_MEMORY):
        return Verdict.NO
    return min(verdicts, key=list(Verdict).index)


def classify_text(text: str) -> Verdict:
    """Say whether a message, such as a dead process's last words, means that memory ran out."""
    if any(never in text for never in NEVER_MEMORY):
        return Verdict.NO
    return next((verdict for part, verdict in SIGNATURES if part in text), Verdict.NO)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "") or (
        type(error).__name__
    )


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while chain[-1].__cause__ is not None and chain[-1].__cause__ not in chain:
        chain.append(chain[-1].__cause__)
    return chain


def _classify_one(error: BaseException) -> Verdict:
    if isinstance(error, MemoryError):
        return Verdict.CERTAIN
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return Verdict.CERTAIN
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return Verdict.CERTAIN
    if isinstance(error, RuntimeError):
        return classify_text(str(error))
    return Verdict.NO
