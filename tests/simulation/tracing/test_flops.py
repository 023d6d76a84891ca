"""Operations are counted as torch's own counter does, and a shape that it refuses stops nothing."""

from __future__ import annotations

import torch
from torch.utils import flop_counter

from memfit.simulation.tracing.flops import flops_of_call


def test_a_product_is_two_operations_for_each_pair() -> None:
    left, right = torch.empty(3, 5), torch.empty(5, 7)
    call = torch.ops.aten.mm.default
    assert flops_of_call(call, (left, right), {}, left @ right) == 2 * 3 * 5 * 7


def test_keys_that_all_heads_share_are_not_counted_where_torch_refuses_them() -> None:
    """mobilenetv5 has such attention. Its memory is simulated all the same."""
    query, key = torch.empty(2, 4, 8, 16), torch.empty(2, 1, 8, 16)
    call = torch.ops.aten._scaled_dot_product_efficient_attention.default
    found = flops_of_call(call, (query, key, key, None, False), {}, (query,))
    try:
        expected = flop_counter.sdpa_flop_count(query.shape, key.shape, key.shape)
    except AssertionError:
        expected = 0
    assert found == expected
