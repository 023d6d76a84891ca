"""What an operation returned once is made again, and is what PyTorch returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memfit.simulation.tracing.remembered import Remembered

aten = torch.ops.aten
META = torch.device("meta")


class Counted:
    """Runs operations, and counts them."""

    def __init__(self) -> None:
        self.num_runs = 0
        self._remembered = Remembered()

    def __call__(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return self._remembered.run(self._run, func, args, kwargs)

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.num_runs += 1
        return func(*args, **kwargs)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def described(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.shape, result.dtype, result.stride(), result.untyped_storage().nbytes()
    return [described(item) for item in result] if isinstance(result, (list, tuple)) else result


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (aten.mul.Tensor, (tensor(2, 3), tensor(2, 1)), {}),
        (aten.hardswish.default, (tensor(2, 3).t(),), {}),
        (aten.clone.default, (tensor(2, 6, 4).transpose(1, 2),), {}),
        (aten._to_copy.default, (tensor(2, 3),), {"dtype": torch.bfloat16}),
        (aten.native_layer_norm.default, (tensor(2, 4), [4], None, None, 1e-5), {}),
        (aten.var_mean.correction, (tensor(2, 3, 4), [0, 2]), {"correction": 0}),
        (aten.cat.default, ([tensor(2, 3), tensor(2, 5)], 1), {}),
    ],
    ids=str,
)
def test_the_second_result_is_new_and_like_the_first(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """The operation runs once, and the two results share no storage."""
    run = Counted()
    first, second = run(func, *args, **kwargs), run(func, *args, **kwargs)
    assert run.num_runs == 1
    assert described(second) == described(first) == described(func(*args, **kwargs))
    one, other = (made[0] if isinstance(made, tuple) else made for made in (first, second))
    assert one.untyped_storage()._cdata != other.untyped_storage()._cdata


def test_other_arguments_are_another_question() -> None:
    """Shapes, strides, types and the kind of a number are told apart."""
    run = Counted()
    counts = tensor(2, 3, dtype=torch.int64)
    for number in (2, 2.0, True):
        assert run(aten.mul.Scalar, counts, number).dtype is (counts * number).dtype
    for data in (tensor(2, 3), tensor(3, 2).t(), tensor(2, 3, dtype=torch.float16)):
        assert described(run(aten.neg.default, data)) == described(-data)
    assert run.num_runs == 6


def test_writing_in_place_returns_the_argument() -> None:
    """The second result of an in-place operation is the second argument."""
    run = Counted()
    for data in (tensor(2, 3), tensor(2, 3)):
        assert run(aten.hardswish_.default, data) is data
    assert run.num_runs == 1


def test_what_changes_a_tensors_shape_always_runs() -> None:
    """An in-place operation that changes what its argument looks like is not remembered."""
    run = Counted()
    for _ in range(2):
        data = tensor(2, 3)
        run(aten.t_.default, data)
        assert list(data.shape) == [3, 2]
        run(aten.unsqueeze_.default, data, 0)
        assert list(data.shape) == [1, 3, 2]


def test_views_always_run() -> None:
    """A view shares its argument's storage, also where its operation does not say so."""
    run = Counted()
    for _ in range(2):
        data = tensor(2, 3)
        for view in (
            run(aten.view.default, data, [6]),
            run(aten._unsafe_view.default, data, [3, 2]),
        ):
            assert view.untyped_storage()._cdata == data.untyped_storage()._cdata
    assert run.num_runs == 4


def test_values_are_not_remembered() -> None:
    """A tensor with values is computed with each time."""
    run = Counted()
    assert [run(aten.add.Scalar, torch.tensor(value), 1).item() for value in (1, 2)] == [2, 3]
