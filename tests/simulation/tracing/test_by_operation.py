"""What is remembered of operations."""

from __future__ import annotations

from typing import Any

import torch

from memfit.simulation.tracing.by_operation import name_of, once_per_operation

ADD, MUL = torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor


def test_each_operation_is_asked_once() -> None:
    """The answer is kept, also if it is nothing."""
    asked: list[Any] = []

    @once_per_operation
    def is_add(func: Any) -> bool | None:
        asked.append(func)
        return True if func is ADD else None

    assert [is_add(func) for func in (ADD, MUL, ADD, MUL)] == [True, None, True, None]
    assert asked == [ADD, MUL]


def test_a_name_is_the_one_that_torch_shows() -> None:
    """Overloads have names of their own."""
    assert name_of(ADD) == str(ADD) == "aten.add.Tensor"
    assert name_of(torch.ops.aten.add.Scalar) == "aten.add.Scalar"
