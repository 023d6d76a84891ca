"""Copies without values, of everything that a model keeps."""

from __future__ import annotations

import functools
import random
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from memfit.errors import NotSimulatedError, WorkloadError
from memfit.step.meta_copy import without_values


class Net(nn.Module):
    """Keeps the objects it is told to keep."""

    def __init__(self, keep: Callable[[Net, torch.Tensor], None] | None = None) -> None:
        super().__init__()
        self.kept: Any = None
        self.own: Any = None
        self.rows: Any = None
        self.layer = nn.Linear(4, 4)
        self.keep = keep

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(data)
        if self.keep is not None:
            self.keep(self, output)
        return output


def in_attribute(net: Net, output: torch.Tensor) -> None:
    net.kept = output


def in_dictionary(net: Net, output: torch.Tensor) -> None:
    net.kept = OrderedDict(out={"deep": [output]})


def in_tuple(net: Net, output: torch.Tensor) -> None:
    net.kept = (output, 0)


def in_deque(net: Net, output: torch.Tensor) -> None:
    net.kept = deque([output])


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [t for v in items if not isinstance(v, int) for t in tensors_of(v)]


@pytest.mark.parametrize("keep", [in_attribute, in_dictionary, in_tuple, in_deque])
def test_an_activation_that_is_kept_is_copied(keep: Callable[[Net, torch.Tensor], None]) -> None:
    """It may be part of a graph or not, and lie in any depth."""
    net = Net(keep)
    net(torch.randn(2, 4))
    copied = without_values(net)
    (kept,) = tensors_of(copied.kept)
    assert kept.is_meta
    assert kept.shape == (2, 4)
    assert not kept.requires_grad
    (own,) = tensors_of(net.kept)
    assert own.device.type == "cpu"
    assert own.grad_fn is not None


@pytest.mark.parametrize(
    "value",
    [
        threading.Lock(),
        threading.RLock(),
        threading.Condition(),
        torch.Generator(),
        random.Random(1),  # noqa: S311 - a model may own one
    ],
)
def test_what_holds_no_tensors_is_copied(value: object) -> None:
    """Locks are new, and generators of numbers go on from where they were."""
    net = Net()
    net.own = value
    assert type(without_values(net).own) is type(value)
    assert net.own is value


def test_a_generator_may_be_kept_and_not_used() -> None:
    """It can neither be copied nor put back, so drawing from the copy is refused."""
    net = Net()
    net.rows = (number for number in range(3))
    copied = without_values(net)
    with pytest.raises(NotSimulatedError, match="takes values from a generator"):
        next(copied.rows)
    assert next(net.rows) == 0


def test_hooks_write_into_the_copy() -> None:
    """A hook closes over a dictionary or the model, and the user's objects do not change."""
    net = Net()
    seen: dict[str, torch.Tensor] = {}
    net.own = {}
    net.register_forward_hook(lambda _module, _args, output: seen.update(out=output))
    net.layer.register_forward_hook(lambda _module, _args, output: net.own.update(out=output))
    copied = without_values(net)
    copied(torch.zeros(2, 4, device="meta"))
    assert not seen
    assert not net.own
    assert copied.own["out"].is_meta


def closing(loss: nn.Module) -> Callable[..., torch.Tensor]:
    def called(output: torch.Tensor) -> torch.Tensor:
        return loss(output).square()  # type: ignore[no-any-return]

    return called


@pytest.mark.parametrize("wrap", [closing, functools.partial, lambda loss: loss])
def test_a_loss_computes_with_copies_of_what_it_closes_over(
    wrap: Callable[[nn.Module], Callable[..., torch.Tensor]],
) -> None:
    """This is a module with weights, in a closure or not; the optimizer holds them too."""
    net, loss = Net(), nn.Linear(4, 1)
    optimizer = torch.optim.SGD([*net.parameters(), *loss.parameters()])
    model, function, copied = without_values((net, wrap(loss), optimizer), optimizer=optimizer)
    function(model(torch.zeros(2, 4, device="meta"))).sum().backward()
    held = copied.param_groups[0]["params"]
    assert len(held) == 4
    assert all(parameter.is_meta and parameter.grad is not None for parameter in held)
    assert all(p.grad is None for p in (*net.parameters(), *loss.parameters()))


def test_functions_without_tensors_are_shared() -> None:
    """They need no copy."""
    _, function = without_values((Net(), nn.functional.cross_entropy))
    assert function is nn.functional.cross_entropy


def test_an_optimizers_state_is_copied() -> None:
    """Moments lose their values; counters keep them, on the CPU."""
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    model, copied = without_values((net, optimizer), optimizer=optimizer)
    state = copied.state[model.layer.weight]
    assert state["exp_avg"].is_meta
    assert state["step"].item() == 1
    assert optimizer.state[net.layer.weight]["exp_avg"].device.type == "cpu"


def test_torch_copies_as_before_afterwards() -> None:
    """Functions that were replaced during the copy are put back, also after an error."""
    net = Net()
    net.own = object.__new__(type("Refuses", (), {"__reduce_ex__": _refuse}))
    with pytest.raises(NotSimulatedError, match=r"cannot be copied \(I am one"):
        without_values(net)
    import copy

    assert torch.equal(copy.deepcopy(net.layer.weight), net.layer.weight)
    with pytest.raises(TypeError):
        copy.deepcopy(threading.Lock())


def _refuse(_self: object, _protocol: int) -> None:
    raise TypeError("I am one of a kind")


def test_lazy_modules_are_refused() -> None:
    """They have no shape yet."""
    with pytest.raises(WorkloadError, match="'weight' of LazyLinear has no shape yet"):
        without_values(nn.LazyLinear(3))
