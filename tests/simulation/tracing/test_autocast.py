"""CUDA's autocast policy on meta tensors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from memfit.records import Precision
from memfit.simulation.tracing import autocast
from memfit.simulation.tracing.attention import AttentionBackend
from memfit.simulation.tracing.semantics import CudaSemantics, MetaPrecision
from memfit.simulation.tracing.trace import TraceOptions
from memfit.simulation.tracing.workspace import Kernels


@pytest.mark.parametrize(
    ("macro", "ours"),
    [
        ("AT_FORALL_LOWER_PRECISION_FP", autocast.LOWER_PRECISION),
        ("AT_FORALL_FP32", autocast.FP32),
        ("AT_FORALL_FP32_SET_OPT_DTYPE", autocast.FP32_SET_OPT_DTYPE),
        ("AT_FORALL_PROMOTE", autocast.PROMOTE),
    ],
)
def test_policy_is_the_installed_torchs(macro: str, ours: frozenset[str]) -> None:
    """The lists equal the macros in the header of the installed torch."""
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    text = header.read_text()
    found = re.search(rf"#define {macro}\(_\)(.*?)\n\n", text, re.DOTALL)
    if found is None:
        pytest.skip(f"this torch's header has no {macro}")
    assert set(re.findall(r"_\((\w+)", found[1])) == ours


def semantics(dtype: torch.dtype) -> tuple[CudaSemantics, autocast.CudaAutocast]:
    cast = autocast.CudaAutocast(dtype)
    options = TraceOptions(compute_capability=(8, 0), kernels=Kernels(compute_capability=(8, 0)))
    return CudaSemantics(cast, options.choose_attention), cast


def test_casts_as_cuda_does() -> None:
    """Products run in half, norms and losses in fp32, other operations in their input type."""
    mode, cast = semantics(torch.bfloat16)
    layer = torch.nn.Linear(8, 8, device="meta")
    norm = torch.nn.LayerNorm(8, device="meta")
    data = torch.empty(4, 8, device="meta")
    with autocast.functional_layer_open(), mode, cast.forward():
        hidden = layer(data)
        assert hidden.dtype is torch.bfloat16
        assert (hidden @ hidden.T).dtype is torch.bfloat16
        assert F.gelu(hidden).dtype is torch.bfloat16
        assert norm(hidden).dtype is torch.float32
        assert F.softmax(hidden, dim=-1).dtype is torch.float32
        assert hidden.sum().dtype is torch.float32
        assert hidden.square().dtype is torch.float32
        assert (hidden + data).dtype is torch.float32
        assert torch.einsum("ij,kj->ik", data, data).dtype is torch.bfloat16
        assert torch.addcmul(data, hidden, hidden).dtype is torch.float32
        target = torch.zeros(4, dtype=torch.long, device="meta")
        assert F.cross_entropy(hidden, target).dtype is torch.float32
        assert F.cross_entropy(hidden, target, label_smoothing=0.1).dtype is torch.float32
    assert layer(data).dtype is torch.float32


def test_casts_of_parameters_are_kept_until_it_ends() -> None:
    """A weight used twice is cast once, and again in the next forward."""
    mode, cast = semantics(torch.float16)
    layer = torch.nn.Linear(8, 8, device="meta")
    data = torch.empty(4, 8, device="meta")
    with autocast.functional_layer_open(), mode:
        with cast.forward():
            layer(layer(data))
            first = dict(cast._cache)
            assert len(first) == 2
        assert not cast._cache
        with cast.forward():
            layer(data)
            key = (id(layer.weight), torch.float16)
            assert cast._cache[key] is not first[key]


def test_operands_are_cast_in_torchs_order() -> None:
    """The last argument first, and the operands of einsum, which are one list, in their order."""
    mode, cast = semantics(torch.bfloat16)
    one, other = (torch.empty(8, 8, device="meta", requires_grad=True) for _ in range(2))
    keys = [(id(tensor), torch.bfloat16) for tensor in (one, other)]
    with autocast.functional_layer_open(), mode:
        with cast.forward():
            torch.einsum("ij,kj->ik", one, other)
            assert list(cast._cache) == keys
        with cast.forward():
            F.linear(one, other)
            assert list(cast._cache) == keys[::-1]


def test_fp16_softmax_reads_half_and_writes_float() -> None:
    """fp16 has no converted copy of the input; bf16 has one."""
    mode, cast = semantics(torch.float16)
    half = torch.empty(4, 8, device="meta", dtype=torch.float16, requires_grad=True)
    with autocast.functional_layer_open(), mode, cast.forward():
        output = F.softmax(half, dim=-1)
    assert output.dtype is torch.float32
    assert type(output.grad_fn).__name__ == "SoftmaxBackward0"
    assert output.grad_fn is not None
    assert output.grad_fn.next_functions[0][0] is not None
    assert type(output.grad_fn.next_functions[0][0]).__name__ == "AccumulateGrad"


def test_the_functional_layer_is_put_back() -> None:
    """Functions that were replaced are back, also after an error."""
    functional: Any = F
    before = functional.has_torch_function_unary
    with pytest.raises(RuntimeError, match="boom"), autocast.functional_layer_open():
        raise RuntimeError("boom")
    assert functional.has_torch_function_unary is before


def test_attention_and_dropout_go_the_devices_way() -> None:
    """The card decides on fused attention, and dropout's mask has booleans."""
    mode, cast = semantics(torch.float16)
    query = torch.empty(2, 3, 10, 16, device="meta", requires_grad=True)
    with autocast.functional_layer_open(), mode, cast.forward():
        output = F.scaled_dot_product_attention(query, query, query)
        dropped = F.dropout(output, 0.5)
    assert output.dtype is torch.float16
    assert list(mode.attention.values()) == [AttentionBackend.FLASH]
    assert type(dropped.grad_fn).__name__ == "NativeDropoutBackward0"


def test_only_mixed_precision_has_autocast() -> None:
    """In other precisions operations use the types of the tensors."""
    for precision in (Precision.FP32, Precision.BF16, Precision.AMP_FP16):
        policy = MetaPrecision(precision)
        with policy.forward():
            assert policy.autocast.is_active == (precision is Precision.AMP_FP16)
