"""Out of memory is recognised: all known messages, and errors that only look like it."""

from __future__ import annotations

import errno

import pytest
import torch

from memfit.memory.oom import SIGNATURES, Likelihood, classify, classify_text, first_line

CERTAIN = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory. (out of memory)"),
    torch.OutOfMemoryError("an allocator with other words"),
    RuntimeError("Allocation on device "),
    RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("XPU out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB, other allocations: 1 GB)"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    # The advice below the error names device-side assertions.
    RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some "
        "other API call\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
    ),
    RuntimeError("CUDA ran out of memory outside PyTorch's allocator"),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("MODULE:PT_DEVMEM Allocation failed with fatal error"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]
SUSPECTED = [
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not execute a primitive"),
]
NOT_MEMORY = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA out of memory. after an illegal memory access"),
    RuntimeError("weight of size [8], expected input's required rank to be 4"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    ValueError("CUDA out of memory."),
    KeyError("memory"),
    OSError(errno.ENOSPC, "No space left on device"),
]


@pytest.mark.parametrize("error", CERTAIN, ids=lambda error: str(error)[:40])
def test_certain(error: Exception) -> None:
    """The allocators' own words need no further check."""
    assert classify(error) is Likelihood.CERTAIN


@pytest.mark.parametrize("error", SUSPECTED, ids=lambda error: str(error)[:40])
def test_suspected(error: Exception) -> None:
    """Words that libraries also use for other limits need a further check."""
    assert classify(error) is Likelihood.SUSPECTED


@pytest.mark.parametrize("error", NOT_MEMORY, ids=lambda error: str(error)[:40])
def test_not_memory(error: Exception) -> None:
    """A poisoned context, wrong code and a user's own exception are never retried."""
    assert classify(error) is Likelihood.NO


def test_every_signature_is_exercised() -> None:
    """Every message in the table needs an example here."""
    texts = [str(error) for error in (*CERTAIN, *SUSPECTED)]
    missing = {part for part, _ in SIGNATURES if not any(part in text for text in texts)}
    assert missing == {"HIP error: out of memory"}


def test_real_errors_of_this_torch_are_recognised() -> None:
    """These messages come from the installed torch itself."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert classify(caught.value) is Likelihood.CERTAIN


def test_an_error_raised_from_one_about_memory_is_about_memory() -> None:
    """Code may wrap an out-of-memory in its own exception."""

    class TrainerError(Exception):
        pass

    error = TrainerError("the step failed")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory.")
    assert classify(error) is Likelihood.CERTAIN
    error.__cause__ = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert classify(error) is Likelihood.NO


def test_a_bug_met_while_handling_one_is_a_bug() -> None:
    """Only an explicit cause counts, and the context does not."""
    try:
        try:
            raise MemoryError
        except MemoryError:
            raise KeyError("typo")  # noqa: B904 - the context is the point
    except KeyError as error:
        assert classify(error) is Likelihood.NO


def test_last_words_are_classified() -> None:
    """A dead process leaves text instead of an exception."""
    words = "terminate called after throwing an instance of 'std::bad_alloc'"
    assert classify_text(words) is Likelihood.CERTAIN
    assert classify_text("Segmentation fault") is Likelihood.NO


def test_first_line() -> None:
    """The first line is used; for an empty message the type is used."""
    assert first_line(RuntimeError("\n one \n two")) == "one"
    assert first_line(MemoryError()) == "MemoryError"
