"""A step's model is compiled for one batch size at a time, and only where torch can compile it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import memfit
from memfit.errors import NotSimulatedError, UnsupportedError, UsageError
from memfit.step.compiling import CompiledModel, check_can_compile
from memfit.step.workload import Workload


def small(**changes: Any) -> Workload:
    """Return a workload of one layer."""
    parts: dict[str, Any] = {
        "model": nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        "batch": (torch.randn(2, 4), torch.randn(2, 4)),
        "loss": nn.functional.mse_loss,
        "optimizer": "sgd",
    }
    return Workload(**{**parts, **changes})


def test_every_trial_compiles_for_its_own_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second size is not compiled as a variable size, as torch does within one run."""
    shapes: list[tuple[Any, ...]] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        shapes.extend(tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor) and i.ndim == 2)
        shapes.extend((i,) for i in inputs if not isinstance(i, torch.Tensor))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model = nn.Sequential(nn.ReLU())
    compiled = CompiledModel(model)
    for size in (5, 7, 5):
        compiled.module(torch.randn(size, 3))
        compiled.module(torch.randn(size, 3))
        compiled.forget()
    assert shapes == [(5, 3), (7, 3), (5, 3)]
    assert all(isinstance(side, int) for shape in shapes for side in shape)
    assert not hasattr(model, "_orig_mod")


def test_a_simulation_and_a_cpu_refuse_in_one_sentence() -> None:
    """The simulation offers the rehearsal; a CPU would count the compiler's own memory."""
    with pytest.raises(NotSimulatedError, match=r"it is compiled.* Rehearse it instead"):
        memfit.estimate(small(), 2, gpu="rtx3060", engine="simulate", compile=True)
    with pytest.raises(UsageError, match=r"compile \(--compile\) is for GPUs"):
        memfit.probe(small(), device="cpu", compile=True)
    with pytest.raises(UsageError, match="verify watches single layers"):
        memfit.verify(small(), micro_batch_size=1, accumulation_steps=2, compile=True)


def test_a_model_that_is_compiled_already_is_not_compiled_again() -> None:
    """The user is told to leave the option out."""
    whole = small(model=torch.compile(nn.Linear(4, 4)))
    part = nn.Sequential(nn.Linear(4, 4))
    part[0].compile()
    for workload in (whole, small(model=part)):
        with pytest.raises(UsageError, match="is compiled already"):
            memfit.estimate(workload, 2, gpu="rtx3060", compile=True)


def test_what_torch_needs_to_compile_is_looked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old GPU, no Triton and no C compiler each get a sentence."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Old")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (6, 1))
    with pytest.raises(UnsupportedError, match=r"Old has 6\.1"):
        check_can_compile(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    monkeypatch.setattr("shutil.which", lambda _name: None)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UnsupportedError, match=r"Triton|C compiler"):
        check_can_compile(gpu)
