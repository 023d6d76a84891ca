"""What a traced model is told about the device of its tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch

from memfit.simulation.tracing.attention import AttentionBackend
from memfit.simulation.tracing.autocast import CudaAutocast
from memfit.simulation.tracing.semantics import CudaSemantics

META_TYPE = torch.device("meta").type


@pytest.fixture
def data() -> Iterator[torch.Tensor]:
    """Return a tensor of a step that is traced."""
    with CudaSemantics(CudaAutocast(torch.bfloat16), lambda _call: AttentionBackend.FLASH):
        yield torch.empty(4, device="meta")


def test_code_that_names_the_meta_device_is_told_of_the_card(data: torch.Tensor) -> None:
    """It goes the way that it would go on the card."""
    assert data.device.type != "meta"
    assert not data.is_meta


def test_the_cards_device_can_be_used(data: torch.Tensor) -> None:
    """New tensors land on the meta device, which the trace needs."""
    told = data.device if data.device.type != "meta" else None
    assert told == torch.device("cuda", 0)
    made = torch.zeros(3, device=told)
    moved = torch.zeros(3).to(told)
    assert _type_of(made) == _type_of(moved) == META_TYPE


def test_other_code_sees_where_its_tensors_are(data: torch.Tensor) -> None:
    """A tensor of the CPU is never said to be on the card."""
    assert _type_of(data) == META_TYPE
    assert torch.zeros(3).device.type != "meta"
    assert torch.zeros(3).device == torch.device("cpu")


def test_asking_keeps_no_tensor(data: torch.Tensor) -> None:
    """A tensor that was asked about is freed as soon as it is dropped, without the collector."""
    made = torch.zeros(3, device=data.device)
    assert made.device.type != "meta"
    assert not made.is_meta
    gone = weakref.ref(made)
    del made
    assert gone() is None


def _type_of(tensor: torch.Tensor) -> str:
    return str(tensor.device.type)
