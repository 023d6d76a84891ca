"""Saves the bits of a tensor in host memory, and puts them back.

`memfit.memory.restore` decides which tensors are saved, and when they are put back.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import torch

__all__ = ["SavedTensor", "can_be_saved", "host_copy"]

_INTEGER_OF_BYTES: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor and its bits.

    Args:
        tensor: The tensor itself. It stays the same object.
        data: The tensor's elements without autograd, in the tensor's storage when it was saved.
        written: The tensor that bits are copied to when they are put back, in the same storage.
        host: The bits of `written`, in host memory.
        storage_bytes: Bytes of the storage.
        requires_grad: The tensor's `requires_grad` when it was saved.
    """

    tensor: torch.Tensor
    data: torch.Tensor
    written: torch.Tensor
    host: torch.Tensor
    storage_bytes: int
    requires_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> SavedTensor:
        """Save a tensor."""
        data = tensor.detach()
        written = _whole_storage(data) if _may_overlap(data) else data
        return cls(
            tensor,
            data,
            written,
            host_copy(written),
            data.untyped_storage().nbytes(),
            tensor.requires_grad,
        )

    def release_if_replaced(self) -> None:
        """Release the old storage on the device if the tensor has other data by now."""
        if _is_elsewhere(self.tensor, self.data):
            self.data.untyped_storage().resize_(0)

    def restore(self) -> torch.Tensor:
        """Put the bits back, and return the tensor."""
        with torch.no_grad():
            storage = self.data.untyped_storage()
            if storage.nbytes() == 0:
                storage.resize_(self.storage_bytes)
            if _is_elsewhere(self.tensor, self.data):
                self.tensor.data = self.data
            # Equal bits are not written again, because a write would break a graph that saved them.
            if not _same_bits(self.written, self.host):
                self.written.copy_(self.host)
        if self.tensor.is_leaf:
            self.tensor.requires_grad_(self.requires_grad)
        return self.tensor


def can_be_saved(tensor: torch.Tensor) -> bool:
    """Whether a tensor has one plain storage whose bits can be copied."""
    return tensor.layout is torch.strided and not (
        tensor.is_meta or tensor.is_nested or tensor.is_quantized
    )


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in host memory with the same strides, so that it copies back bit for bit."""
    return torch.empty_like(tensor, device="cpu", memory_format=torch.preserve_format).copy_(tensor)


def _is_elsewhere(tensor: torch.Tensor, data: torch.Tensor) -> bool:
    """Whether the tensor has other data by now: other memory, type, layout or device."""
    return tensor.data_ptr() != data.data_ptr() or (
        (tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        != (data.dtype, data.shape, data.stride(), data.device)
    )


def _may_overlap(data: torch.Tensor) -> bool:
    """Whether elements may share memory, as in an expanded tensor. torch cannot write to those."""
    is_repeated = any(
        stride == 0 and size > 1 for size, stride in zip(data.shape, data.stride(), strict=True)
    )
    return is_repeated or data.numel() * data.element_size() > data.untyped_storage().nbytes()


def _whole_storage(data: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor's storage as a tensor."""
    flat = torch.empty(0, dtype=torch.uint8, device=data.device)
    return flat.set_(data.untyped_storage())


def _same_bits(tensor: torch.Tensor, host: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, including NaNs and the sign of zero."""
    integer = _INTEGER_OF_BYTES.get(host.element_size())
    if integer is None or tensor.is_conj() or tensor.is_neg():
        return False
    return torch.equal(tensor.view(integer).cpu(), host.view(integer))
