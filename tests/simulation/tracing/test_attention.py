"""The choice of an attention kernel, and the tensors that each one keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from memfit.simulation.tracing.attention import (
    AttentionBackend,
    AttentionCall,
    attend,
    choose,
    describe,
)

PLAIN = AttentionCall(
    dtype=torch.float16,
    head_dim=64,
    value_head_dim=64,
    has_mask=False,
    is_grouped=False,
    has_dropout=False,
    is_cross_causal=False,
)
FLASH, EFFICIENT = AttentionBackend.FLASH, AttentionBackend.EFFICIENT
CUDNN, MATH = AttentionBackend.CUDNN, AttentionBackend.MATH


@pytest.mark.parametrize(
    ("capability", "changes", "backend"),
    [
        ((7, 5), {}, EFFICIENT),
        ((7, 0), {"dtype": torch.bfloat16}, MATH),
        ((7, 5), {"head_dim": 60, "value_head_dim": 60}, MATH),
        ((8, 0), {}, FLASH),
        ((8, 0), {"dtype": torch.float32}, EFFICIENT),
        ((8, 0), {"dtype": torch.float32, "head_dim": 63, "value_head_dim": 63}, MATH),
        ((8, 0), {"dtype": torch.float64}, MATH),
        ((8, 0), {"has_mask": True}, EFFICIENT),
        ((8, 0), {"is_cross_causal": True}, EFFICIENT),
        ((8, 0), {"head_dim": 300, "value_head_dim": 300}, MATH),
        ((8, 0), {"head_dim": 304, "value_head_dim": 304}, EFFICIENT),
        ((8, 0), {"is_grouped": True}, FLASH),
        ((8, 0), {"is_grouped": True, "has_mask": True}, MATH),
        ((8, 6), {"head_dim": 200, "value_head_dim": 200}, EFFICIENT),
        ((8, 0), {"head_dim": 200, "value_head_dim": 200}, FLASH),
        ((9, 0), {}, CUDNN),
        ((9, 0), {"has_mask": True}, CUDNN),
        # Seen in a rehearsal on an H100 with torch 2.15: a learned bias has a gradient.
        ((9, 0), {"has_mask": True, "learns_mask": True}, EFFICIENT),
        ((9, 0), {"head_dim": 160, "value_head_dim": 160}, FLASH),
    ],
)
def test_choice(
    capability: tuple[int, int], changes: dict[str, object], backend: AttentionBackend
) -> None:
    """The conditions are those of PyTorch's own choice."""
    call = dataclasses.replace(PLAIN, **changes)  # type: ignore[arg-type]
    assert choose(call, capability, prefers_cudnn=capability[0] == 9) is backend


@pytest.mark.parametrize("backend", list(AttentionBackend))
@pytest.mark.parametrize("has_mask", [False, True])
def test_every_kernel_runs_on_meta_tensors(backend: AttentionBackend, has_mask: bool) -> None:
    """Forward and backward give the expected shapes."""
    if backend is FLASH and has_mask:
        pytest.skip("flash attention takes no mask")
    query = torch.empty(2, 3, 10, 20, device="meta", dtype=torch.float16, requires_grad=True)
    mask = torch.ones(10, 10, dtype=torch.bool, device="meta") if has_mask else None
    output = attend(
        backend,
        query,
        query,
        query,
        mask=mask,
        dropout=0.0,
        is_causal=False,
        scale=None,
        enable_gqa=False,
    )
    output.sum().backward()
    assert output.shape == query.shape
    assert query.grad is not None


def test_describe() -> None:
    """These facts are read from the tensors."""
    query = torch.empty(2, 4, 10, 16, device="meta")
    key = torch.empty(2, 2, 12, 16, device="meta")
    call = describe(query, key, key, mask=None, dropout=0.1, is_causal=True)
    assert (call.is_grouped, call.has_dropout, call.is_cross_causal) == (True, True, True)
