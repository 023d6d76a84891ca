"""The choice of an attention kernel, and the tensors that each one keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_calls import calls

from memfit.backends.traces import trace_options
from memfit.cards import find_gpu
from memfit.simulation.tracing.attention import (
    AttentionBackend,
    AttentionBuild,
    AttentionCall,
    attend,
    choose,
    describe,
)

PLAIN = AttentionCall(dtype=torch.float16, head_dim=64, value_head_dim=64)
FLASH, EFFICIENT = AttentionBackend.FLASH, AttentionBackend.EFFICIENT
CUDNN, MATH = AttentionBackend.CUDNN, AttentionBackend.MATH


def heads(query: int, value: int | None = None) -> dict[str, object]:
    return {"head_dim": query, "value_head_dim": query if value is None else value}


@pytest.mark.parametrize(
    ("capability", "changes", "backend"),
    [
        ((7, 5), {}, EFFICIENT),
        ((7, 0), {"dtype": torch.bfloat16}, MATH),
        ((7, 5), heads(60), MATH),
        ((8, 0), {}, FLASH),
        ((8, 0), {"dtype": torch.float32}, EFFICIENT),
        ((8, 0), {"dtype": torch.float32, **heads(63)}, MATH),
        ((8, 0), {"dtype": torch.float64}, MATH),
        ((8, 0), {"has_mask": True}, EFFICIENT),
        ((8, 0), {"is_cross_causal": True}, EFFICIENT),
        ((8, 0), heads(300), MATH),
        ((8, 0), heads(304), EFFICIENT),
        ((8, 0), {"is_grouped": True}, FLASH),
        ((8, 6), heads(200), EFFICIENT),
        ((8, 6), heads(200) | {"needs_gradient": False}, FLASH),
        ((8, 0), heads(200), FLASH),
        ((8, 0), {"refused": frozenset({FLASH})}, EFFICIENT),
        ((9, 0), {"refused": frozenset({CUDNN})}, FLASH),
        ((8, 6), {"refused": frozenset({FLASH, EFFICIENT, MATH})}, CUDNN),
        ((9, 0), {}, CUDNN),
        ((9, 0), {"has_mask": True}, CUDNN),
        # Seen in a rehearsal on an H100 with torch 2.15: a learned bias has a gradient.
        ((9, 0), {"has_mask": True, "learns_mask": True}, EFFICIENT),
        ((9, 0), heads(0), MATH),
        ((9, 0), {"has_one_key": True}, FLASH),
        ((9, 0), {"has_one_query": True}, CUDNN),
        ((12, 0), {}, FLASH),
    ],
)
def test_choice(
    capability: tuple[int, int], changes: dict[str, object], backend: AttentionBackend
) -> None:
    """The conditions are those of PyTorch's own choice."""
    call = dataclasses.replace(PLAIN, **changes)  # type: ignore[arg-type]
    assert choose(call, capability, AttentionBuild(torch_release=(2, 15))) is backend


@pytest.mark.parametrize(
    ("release", "capability", "changes", "backend"),
    [
        ((2, 9), (9, 0), {}, FLASH),
        ((2, 11), (9, 0), {}, CUDNN),
        ((2, 11), (9, 0), {"dropout": 0.1}, CUDNN),
        ((2, 12), (9, 0), {"dropout": 0.1}, FLASH),
        ((2, 12), (9, 0), {"dropout": 0.125}, CUDNN),
        ((2, 12), (9, 0), {"dropout": 0.125, "has_one_query": True}, FLASH),
        ((2, 12), (9, 0), heads(160), CUDNN),
        ((2, 12), (10, 0), heads(160), FLASH),
        ((2, 12), (10, 0), heads(192, 128), CUDNN),
        ((2, 14), (9, 0), heads(160), FLASH),
        ((2, 14), (9, 0), heads(160) | {"needs_gradient": False}, CUDNN),
        ((2, 14), (10, 0), heads(256), CUDNN),
        ((2, 12), (8, 0), {"is_grouped": True, "has_mask": True}, MATH),
        ((2, 14), (8, 0), {"is_grouped": True, "has_mask": True}, EFFICIENT),
    ],
)
def test_choice_by_release(
    release: tuple[int, int],
    capability: tuple[int, int],
    changes: dict[str, object],
    backend: AttentionBackend,
) -> None:
    """Some conditions came with a release. All of these were seen in rehearsals."""
    call = dataclasses.replace(PLAIN, **changes)  # type: ignore[arg-type]
    assert choose(call, capability, AttentionBuild(torch_release=release)) is backend


def test_choice_without_cudnn() -> None:
    """An older cuDNN is not preferred, and deterministic algorithms leave it out."""
    older = AttentionBuild(torch_release=(2, 15), cudnn_version=91002)
    fixed = AttentionBuild(torch_release=(2, 15), is_deterministic=True)
    assert choose(PLAIN, (9, 0), older) is choose(PLAIN, (9, 0), fixed) is FLASH


def test_no_kernel_is_left() -> None:
    """It is torch's own error, in its own words."""
    call = dataclasses.replace(PLAIN, refused=frozenset({MATH, EFFICIENT, CUDNN}), has_mask=True)
    with pytest.raises(RuntimeError, match="No available kernel"):
        choose(call, (8, 0), AttentionBuild(torch_release=(2, 15)))


@pytest.mark.rehearses
@pytest.mark.parametrize("card", ["T4", "RTX 3090", "H100", "B200", "RTX 5090"])
def test_the_choice_is_that_of_torch(card: str, run_rehearsed: Callable[[Path, str], Any]) -> None:
    """On a rehearsed card, torch is asked for some thousands of calls which kernel it takes."""
    asked = run_rehearsed(Path(__file__).with_name("attention_calls.py"), card)
    options = trace_options(find_gpu(card))
    differ = []
    for (tensors, others), backend in zip(calls("meta"), asked, strict=True):
        call = describe(
            *tensors,
            mask=others["attn_mask"],
            dropout=others["dropout_p"],
            is_causal=others["is_causal"],
        )
        if options.choose_attention(call).value != backend:
            differ.append((call, backend))
    assert not differ


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
    assert (call.is_grouped, call.dropout, call.is_cross_causal) == (True, 0.1, True)
