"""Regions of autocast inside a model, in a traced step with its own autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from memfit.simulation.tracing import autocast
from memfit.simulation.tracing.attention import AttentionBackend
from memfit.simulation.tracing.autocast import CudaAutocast
from memfit.simulation.tracing.autocast_regions import regions_followed
from memfit.simulation.tracing.semantics import CudaSemantics

HALF = torch.bfloat16


@pytest.fixture
def cast() -> Iterator[CudaAutocast]:
    """Return a trace with bf16 autocast that is not entered yet."""
    made = CudaAutocast(HALF)
    mode = CudaSemantics(made, lambda _call: AttentionBackend.FLASH)
    with autocast.functional_layer_open(), regions_followed(made), mode:
        yield made


def product(data: torch.Tensor) -> torch.dtype:
    return (data @ data).dtype


@pytest.mark.parametrize(
    "off",
    [
        lambda data: torch.autocast(device_type=data.device.type, enabled=False),
        lambda _data: torch.autocast("cuda", enabled=False),
        lambda _data: torch.amp.autocast("cuda", enabled=False),
    ],
)
def test_a_region_without_autocast_casts_nothing(
    cast: CudaAutocast, off: Callable[[torch.Tensor], torch.autocast]
) -> None:
    """After the region everything is as before."""
    data = torch.empty(4, 4, device="meta")
    with cast.forward():
        assert product(data) is HALF
        with off(data):
            assert product(data) is torch.float32
            with torch.autocast("cuda", dtype=torch.float16):
                assert product(data) is torch.float16
            assert product(data) is torch.float32
        assert product(data) is HALF
    assert product(data) is torch.float32


def test_a_region_with_autocast_in_a_step_without(cast: CudaAutocast) -> None:
    """It casts, and forgets its casts when it ends."""
    layer = torch.nn.Linear(4, 4, device="meta")
    data = torch.empty(4, 4, device="meta")
    with torch.autocast("cuda", dtype=torch.float16):
        assert layer(data).dtype is torch.float16
        assert cast._cache
    assert not cast._cache
    assert layer(data).dtype is torch.float32


def test_questions_are_answered_as_on_the_card(cast: CudaAutocast) -> None:
    """They are about the card, the device of a tensor, and the CPU."""
    with cast.forward():
        assert torch.is_autocast_enabled()
        assert torch.is_autocast_enabled("cuda")
        assert not torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cuda") is HALF
        with torch.autocast("meta", enabled=False):
            assert not torch.is_autocast_enabled("cuda")
    assert not torch.is_autocast_enabled("cuda")


def test_what_is_recomputed_is_cast_as_it_was(cast: CudaAutocast) -> None:
    """A checkpointed segment inside a region without autocast, recomputed in backward."""
    seen: list[torch.dtype] = []

    def segment(data: torch.Tensor) -> torch.Tensor:
        output = data @ data
        seen.append(output.dtype)
        return output.sin()

    data = torch.empty(4, 4, device="meta", requires_grad=True)
    with cast.forward(), torch.autocast("cuda", enabled=False):
        loss = checkpoint(segment, data, use_reentrant=False).sum()
    with cast.backward():
        torch.autograd.graph._engine_run_backward(
            (loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True
        )
    assert seen == [torch.float32, torch.float32]


def test_torchs_autocast_is_as_before_afterwards() -> None:
    """This holds after an error too."""
    before = (torch.autocast.__enter__, torch.is_autocast_enabled, torch.amp.is_autocast_available)
    with pytest.raises(RuntimeError, match="boom"), regions_followed(CudaAutocast(HALF)):
        raise RuntimeError("boom")
    after = (torch.autocast.__enter__, torch.is_autocast_enabled, torch.amp.is_autocast_available)
    assert before == after
