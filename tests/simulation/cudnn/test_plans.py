"""cuDNN answers for a card that is not there what torch takes on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from convolution_cases import calls, cases

from memfit.cards import find_gpu
from memfit.simulation.cudnn import plans as module
from memfit.simulation.cudnn.needs import workspace_need
from memfit.simulation.cudnn.plans import CudnnPlans, PlanSettings, cudnn_plans, missing_cudnn
from memfit.simulation.cudnn.questions import Convolution, ConvolutionKernel

needs_cudnn = pytest.mark.skipif(
    missing_cudnn() is not None, reason=f"cuDNN cannot be asked: {missing_cudnn()}"
)
# Some plans round their workspaces up by a few bytes for alignment.
FEW_BYTES = 1024


def question(
    kernel: ConvolutionKernel = ConvolutionKernel.FILTER, samples: int = 64
) -> Convolution:
    return Convolution(
        kernel=kernel,
        dtype="float32",
        is_channels_last=False,
        input_shape=(samples, 64, 56, 56),
        weight_shape=(64, 64, 3, 3),
        output_shape=(samples, 64, 56, 56),
        padding=(1, 1),
        stride=(1, 1),
        dilation=(1, 1),
    )


def plans(**settings: bool) -> CudnnPlans:
    found = cudnn_plans((8, 6), PlanSettings(**settings))
    assert found is not None
    return found


@needs_cudnn
@pytest.mark.rehearses
@pytest.mark.parametrize("card", ["RTX 3090", "H100 SXM"])
def test_answers_are_what_torch_takes(card: str, run_rehearsed: Callable[[Path, str], Any]) -> None:
    """Forward and both gradients, in each type and layout, on a rehearsed card."""
    gpu = find_gpu(card)
    real = run_rehearsed(Path(__file__).with_name("convolution_cases.py"), card)
    wrong = []
    for case, taken in zip(cases(), real, strict=True):
        for call, num_bytes in zip(calls(*case), taken, strict=True):
            convolution = call.question()
            assert convolution is not None
            need = workspace_need(convolution, bound_bytes_per_element=0)
            answer = need.rule(gpu, *need.numbers)
            if abs(answer - num_bytes) > FEW_BYTES:
                wrong.append((convolution.text, num_bytes, answer))
    assert not wrong


@needs_cudnn
@pytest.mark.parametrize("kernel", ConvolutionKernel)
def test_the_compiled_graph_answers_as_the_frontends_own(kernel: ConvolutionKernel) -> None:
    """With TF32 and without, for the plan that is taken and for those that are tried."""
    import cudnn

    for settings in ({}, {"allows_tf32": False, "is_deterministic": True}):
        compiled, in_python = plans(**settings), plans(**settings)
        in_python.__dict__["_new_graph"] = cudnn.pygraph
        for tries in (False, True):
            asked = dataclasses.replace(question(kernel), tries_plans=tries)
            assert compiled.workspace_bytes(asked) == in_python.workspace_bytes(asked)


@needs_cudnn
def test_settings_leave_plans_out() -> None:
    """Without TF32 the filter's gradient takes another plan."""
    assert plans().workspace_bytes(question()) != plans(allows_tf32=False).workspace_bytes(
        question()
    )


@needs_cudnn
def test_tried_plans_need_the_largest_workspace() -> None:
    """`cudnn.benchmark` tries plans that the heuristics do not put first."""
    taken = plans().workspace_bytes(question())
    tried = plans().workspace_bytes(dataclasses.replace(question(), tries_plans=True))
    assert taken is not None
    assert tried is not None
    assert tried >= taken


@needs_cudnn
def test_a_question_without_a_plan_is_answered_with_none() -> None:
    """Shapes that do not belong together have no plan."""
    wrong = dataclasses.replace(question(), output_shape=(64, 64, 9, 9))
    assert plans().workspace_bytes(wrong) is None


def test_a_system_without_the_frontend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason names the package to install."""
    monkeypatch.setattr(module, "_PACKAGE", "no_such_package_of_cudnn")
    missing_cudnn.cache_clear()
    try:
        reason = missing_cudnn()
        assert cudnn_plans((8, 6)) is None
    finally:
        missing_cudnn.cache_clear()
    assert reason is not None
    assert "nvidia-cudnn-frontend" in reason or "not built for CUDA" in reason


@needs_cudnn
def test_plans_have_an_order() -> None:
    """torch goes on to the next plan where a workspace finds no room; the last ones need little."""
    asked = plans()
    in_order: list[int] = []
    while True:
        ranked = dataclasses.replace(question(), rank=len(in_order))
        num_bytes = asked.workspace_bytes(ranked)
        if num_bytes is None:
            break
        in_order.append(num_bytes)
    assert in_order[0] == asked.workspace_bytes(question())
    assert len(in_order) > 2
    assert min(in_order) < in_order[0]
