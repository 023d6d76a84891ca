"""Outputs without PyTorch's meta functions equal those with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memfit.simulation.tracing.outputs import outputs

aten = torch.ops.aten
META = torch.device("meta")
HALF, FLOAT = torch.float16, torch.float32


def tensor(*shape: int, dtype: torch.dtype = FLOAT, last: bool = False) -> torch.Tensor:
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=META, memory_format=memory_format)


IMAGES = tensor(2, 6, 5, 4)
LAST = tensor(2, 6, 5, 4, last=True)
ROWS = tensor(2, 7, 8)
CASES: list[tuple[Any, tuple[Any, ...]]] = [
    *(
        (op, (first, second))
        for op in (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor)
        for first, second in [
            (IMAGES, IMAGES),
            (LAST, LAST),
            (LAST, IMAGES),
            (IMAGES, LAST),
            (IMAGES, tensor(2, 6, 1, 1)),
            (LAST, tensor(2, 6, 1, 1)),
            (tensor(2, 6, 1, 1), IMAGES),
            (IMAGES, tensor(4)),
            (ROWS, tensor(2, 7, 8, dtype=HALF)),
            (ROWS.transpose(1, 2), ROWS.transpose(1, 2)),
            (ROWS, tensor(2, 7, 8, dtype=torch.int64)),
            (ROWS, 2.0),
            (tensor(3, dtype=torch.int64), 2.5),
        ]
    ),
    *(
        (op, (data,))
        for op in (
            aten.gelu.default,
            aten.relu.default,
            aten.silu.default,
            aten.sigmoid.default,
            aten.tanh.default,
            aten.hardtanh.default,
            aten.neg.default,
            aten.exp.default,
        )
        for data in (IMAGES, LAST, ROWS, ROWS.transpose(0, 1), ROWS[:, ::2])
    ),
    *((aten.sigmoid.default, (tensor(3, dtype=torch.int64),)),),
    *(
        (op, (data, data))
        for op in (
            aten.gelu_backward.default,
            aten.silu_backward.default,
            aten.sigmoid_backward.default,
            aten.tanh_backward.default,
        )
        for data in (IMAGES, LAST, ROWS.transpose(1, 2))
    ),
    (aten.threshold_backward.default, (LAST, LAST, 0)),
    (aten.hardtanh_backward.default, (LAST, LAST, 0, 6)),
    (aten._softmax_backward_data.default, (ROWS, ROWS, -1, FLOAT)),
    (aten._softmax_backward_data.default, (ROWS, ROWS, -1, HALF)),
    (aten.mm.default, (tensor(3, 4), tensor(5, 4).t())),
    (aten.addmm.default, (tensor(5), tensor(3, 4), tensor(4, 5))),
    (aten.bmm.default, (ROWS, ROWS.transpose(1, 2))),
    *(
        (op, (data, dims, keepdim))
        for op in (aten.sum.dim_IntList, aten.mean.dim)
        for data in (IMAGES, LAST)
        for dims in ([2, 3], [-1], [0])
        for keepdim in (False, True)
    ),
    (aten.sum.dim_IntList, (ROWS, None)),
    (aten.sum.dim_IntList, (tensor(3, dtype=torch.bool), [0])),
    (aten.roll.default, (IMAGES, [1, 2], [2, 3])),
    (aten.roll.default, (LAST, [1, 2], [2, 3])),
    (aten.native_layer_norm.default, (ROWS, [8], tensor(8), tensor(8), 1e-5)),
    (aten.native_layer_norm.default, (ROWS, [7, 8], None, None, 1e-5)),
    (
        aten.native_layer_norm_backward.default,
        (ROWS, ROWS, [8], tensor(2, 7, 1), tensor(2, 7, 1), tensor(8), tensor(8), [True] * 3),
    ),
    *(
        (aten.native_batch_norm.default, (x, *(tensor(6) for _ in range(4)), True, 0.1, 1e-5))
        for x in (IMAGES, LAST)
    ),
    (
        aten.native_batch_norm_backward.default,
        (LAST, LAST, *(tensor(6) for _ in range(5)), True, 1e-5, [True, True, False]),
    ),
    (aten._foreach_sqrt.default, ([IMAGES, LAST, ROWS],)),
    (aten._foreach_add_.Scalar, ([IMAGES, ROWS], 1)),
    (aten._foreach_addcdiv_.ScalarList, ([ROWS], [ROWS], [ROWS], [1.0])),
]


@pytest.mark.parametrize(("func", "args"), CASES, ids=lambda value: str(value)[:60])
def test_outputs_are_pytorchs(func: Any, args: tuple[Any, ...]) -> None:
    """Shape, type and strides are equal for each operation, in plain and in other cases."""
    assert described(outputs(func, args, {})) == described(func(*args))


def described(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.shape, result.dtype, result.stride()
    if isinstance(result, (list, tuple)):
        return [described(item) for item in result]
    return result


def test_an_optimizers_counters_count() -> None:
    """Lists of tensors with values are written to."""
    counters = [torch.tensor(1.0), torch.tensor(2.0)]
    outputs(aten._foreach_add_.Scalar, (counters, 1), {})
    assert [counter.item() for counter in counters] == [2.0, 3.0]
