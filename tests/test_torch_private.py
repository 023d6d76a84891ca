"""If a release of torch drops a private name: what still works, and what the message says."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memfit
from memfit import _torch_private
from memfit._torch_private import NEEDS, dispatched
from memfit.errors import UnsupportedError
from memfit.simulation.tracing.releases import torch_release

PYTREE = "torch.utils._pytree"
DISPATCH = "torch.utils._python_dispatch.TorchDispatchMode"
KINETO = "torch.autograd.profiler.profile.kineto_results"
VERSION = "torch.Tensor._version"


def workload() -> memfit.Workload:
    """Return a tiny step with dropout."""
    model = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.Dropout(0.1), nn.Linear(8, 4))
    return memfit.Workload(
        model,
        (torch.randn(4, 8), torch.randint(4, (4,))),
        nn.functional.cross_entropy,
        torch.optim.AdamW(model.parameters()),
    )


def accumulate() -> None:
    """Take an accumulated step, as a training loop does."""
    work = workload()
    assert isinstance(work.optimizer, torch.optim.Optimizer)
    memfit.Accumulator(work.model, work.optimizer, 2, loss=work.loss).step(work.batch)


SIMULATION = {name for name, needs in NEEDS.items() if "simulate a training step" in needs[0]}
TRACING = SIMULATION | {PYTREE, DISPATCH, "torch._ops.OpOverload._schema"}
if torch_release() >= (2, 9):
    # Before, there is no kernel for RMSNorm.
    TRACING |= {"torch._C._AutoDispatchBelowAutograd"}
FORWARD_MODULES = {"torch._C._autograd._get_sequence_nr", "torch.autograd.graph.Node._sequence_nr"}
COMMANDS: dict[str, tuple[Callable[[], object], set[str]]] = {
    "verify": (
        lambda: memfit.verify(workload(), micro_batch_size=2, accumulation_steps=2, device="cpu"),
        {
            PYTREE,
            DISPATCH,
            VERSION,
            "torch.nn.Module._apply",
            "torch._ops.OpOverload._schema",
        },
    ),
    "profile on a CPU": (
        lambda: memfit.profile(workload(), 2, device="cpu"),
        {PYTREE, KINETO} | FORWARD_MODULES,
    ),
    "profile a simulated card": (
        lambda: memfit.profile(workload(), 2, gpu="rtx3090"),
        TRACING | {"torch._C._current_autograd_node"} | FORWARD_MODULES,
    ),
    "estimate": (lambda: memfit.estimate(workload(), 2, gpu="rtx3090"), TRACING),
    "probe a CPU": (
        lambda: memfit.probe(workload(), device="cpu", memory="64MiB", max_batch_size=2),
        {PYTREE},
    ),
    "accumulate": (accumulate, {VERSION}),
}
"""Each command on a machine without a GPU, and the names that it needs."""


def refusal_of(run: Callable[[], object]) -> str | None:
    """Return the sentence with which a command fails, or `None` if it succeeds."""
    try:
        run()
    except UnsupportedError as error:
        return str(error)
    return None


def without_events(_profiler: object) -> Any:
    """Look for the events of a profiler that has none."""
    return _torch_private.memory_events(object())


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[str]], None]:
    """Remove names of torch from what memfit sees."""
    find, of = _torch_private._find, _torch_private._of

    def remove(names: set[str]) -> None:
        def find_others(name: str) -> Any:
            if name in names:
                raise _torch_private._missing(name, NEEDS[name])
            return find(name)

        def of_others(value: Any, name: str) -> Any:
            return of(object() if name in names else value, name)

        monkeypatch.setattr(_torch_private, "_find", find_others)
        monkeypatch.setattr(_torch_private, "_of", of_others)
        if KINETO in names:
            monkeypatch.setattr("memfit.profiling.measured.memory_events", without_events)

    return remove


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_works_without_the_names_that_it_does_not_need(
    command: str, without: Callable[[set[str]], None]
) -> None:
    """All of them are removed at once."""
    run, needed = COMMANDS[command]
    without(NEEDS.keys() - needed)
    run()


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_a_name_that_is_gone_gets_a_sentence(
    name: str, without: Callable[[set[str]], None]
) -> None:
    """It says what is missing, what needs it, and what still works; no torch traceback."""
    needing = [run for run, needed in COMMANDS.values() if name in needed]
    without({name})
    if not needing:
        # These names are used on a GPU only.
        with pytest.raises(UnsupportedError, match="still works"):
            _torch_private._find(name)
        return
    # Some releases succeed without it; all others must fail with the sentence.
    messages = [message for run in needing if (message := refusal_of(run)) is not None]
    assert messages
    for message in messages:
        assert message.startswith(f"torch {torch.__version__} has no {name}, which memfit needs to")
        assert "work" in message.rpartition(". ")[2]


@pytest.mark.parametrize("name", sorted(NEEDS.keys() - {KINETO}))
def test_every_name_is_found_in_this_torch(name: str) -> None:
    """The list has no misspelt name, and a name that is really gone is noticed."""
    home, _, last = name.rpartition(".")
    if home == "torch.nn.Module":
        assert hasattr(nn.Module(), last)
    elif home == "torch.autograd.graph.Node":
        assert hasattr(torch.ones(1, requires_grad=True).exp().grad_fn, last)
    elif home == "torch._ops.OpOverload":
        assert hasattr(torch.ops.aten.add.Tensor, last)
    else:
        assert _torch_private._find(name) is not None
    with pytest.raises(UnsupportedError):
        _torch_private._of(object(), name)


def test_a_module_that_is_really_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are deleted: the module of trees, and a function of the autograd engine."""
    with monkeypatch.context() as patch:
        patch.delattr(torch.utils, "_pytree")
        patch.setitem(sys.modules, "torch.utils._pytree", None)
        with pytest.raises(UnsupportedError, match="find the tensors of a batch"):
            _torch_private.pytree.tree_leaves([1])
    monkeypatch.delattr(torch.autograd.graph, "_engine_run_backward")
    with pytest.raises(UnsupportedError, match="_engine_run_backward"):
        memfit.estimate("test_vit", 1, gpu="rtx3090")


def test_what_has_a_way_around_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, many tensors can also be copied one by one, only more slowly."""
    monkeypatch.delattr(torch, "_foreach_copy_")
    monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces", raising=False)
    target = torch.zeros(2)
    _torch_private.copy_each([target], [torch.ones(2)])
    _torch_private.clear_blas_workspaces()
    assert torch.equal(target, torch.ones(2))


def test_an_operation_that_is_gone_gets_a_sentence() -> None:
    """If an operation is only a faster way, it is not asked for."""
    assert _torch_private.aten_if_there("no_such_operation.default") is None
    with pytest.raises(UnsupportedError, match=r"no torch\.ops\.aten\.no_such_operation"):
        _torch_private.aten("no_such_operation.default")


def test_memfit_imports_no_private_name_of_torch() -> None:
    """Without the names that were once imported, the commands of a CPU still run."""
    code = """
        import torch, torch.profiler, torch.optim
        import torch.profiler._memory_profiler, torch.cuda._utils, torch.utils._python_dispatch
        from torch._C import _profiler

        del _profiler._EventType, torch.cuda._utils._get_device_index
        del torch.autograd.graph._engine_run_backward, torch._softmax, torch._log_softmax
        del torch._foreach_copy_

        class NoOperations:
            pass

        aten, torch.ops.aten = torch.ops.aten, NoOperations()
        import memfit, memfit.api
        import memfit.simulation.tracing.trace, memfit.simulation.tracing.workspace
        import memfit.profiling.measured, memfit.profiling.attribution

        torch.ops.aten = aten  # torch itself cannot do without
        model = torch.nn.Linear(4, 2)
        work = memfit.Workload(
            model,
            (torch.randn(4, 4), torch.randint(2, (4,))),
            torch.nn.functional.cross_entropy,
            torch.optim.SGD(model.parameters(), lr=0.1),
        )
        found = memfit.verify(work, micro_batch_size=2, accumulation_steps=2, device="cpu")
        print(found.verdict.value)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "equal\n"), ran.stderr


def test_no_other_module_imports_a_private_name_of_torch() -> None:
    """Such an import would break; ruff finds the attributes (SLF001)."""
    root = Path(memfit.__file__).parent
    found = []
    for path in root.rglob("*.py"):
        if path.name == "_torch_private.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                aliases = (alias.name for alias in node.names)
                names = [
                    part for name in aliases if name.startswith("torch") for part in name.split(".")
                ]
            else:
                continue
            found += [f"{path.name}: {name}" for name in names if name.startswith("_")]
    assert found == []


def test_torchs_compiler_has_no_part_in_a_trace() -> None:
    """torch would wrap each call of a dispatch mode, which takes time and loads the compiler."""
    frames: list[str] = []

    def handle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frames.extend(frame.filename for frame in traceback.extract_stack())
        return func(*args, **kwargs)

    with dispatched(handle):
        torch.ones(2).add(1)
    assert frames
    assert not [name for name in frames if "_dynamo" in name or name.endswith("_compile.py")]
