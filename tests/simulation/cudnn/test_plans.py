"""cuDNN answers for a card that is not there what torch takes on it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convolution_cases import calls, cases
from pinned import IS_PINNED

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
NUM_COMPARED = 10


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
def test_cudnn_finds_a_driver_where_there_is_none() -> None:
    """Without one it leaves out the engine that it takes from 138 images on."""
    found = plans()
    assert found.has_driver
    workspaces = []
    for samples in (137, 138):
        depthwise = dataclasses.replace(
            question(ConvolutionKernel.FORWARD),
            dtype="bfloat16",
            is_channels_last=True,
            input_shape=(samples, 128, 14, 14),
            weight_shape=(128, 1, 3, 3),
            output_shape=(samples, 128, 14, 14),
        )
        workspaces.append(found.workspace_bytes(depthwise))
    if IS_PINNED:
        assert workspaces == [2446, 0]


@needs_cudnn
@pytest.mark.rehearses
@pytest.mark.parametrize("card", ["RTX 3090", "H100 SXM", "T4", "B200"])
def test_answers_are_what_torch_takes(card: str, run_rehearsed: Callable[[Path, str], Any]) -> None:
    """Forward and both gradients, in each type and layout, on a rehearsed card."""
    gpu = find_gpu(card)
    real = run_rehearsed(Path(__file__).with_name("convolution_cases.py"), card)
    wrong = []
    for case, taken in zip(cases(), real, strict=True):
        for call, num_bytes in zip(calls(*case), taken, strict=True):
            convolution = call.question()
            assert convolution is not None
            if convolution.dtype == "bfloat16" and not gpu.has_bf16:
                continue  # cuDNN has no such plans, and torch has other kernels
            need = workspace_need(convolution, bound_bytes_per_element=0)
            answer = need.rule(gpu, *need.numbers)
            if abs(answer - num_bytes) > FEW_BYTES:
                wrong.append((convolution.text, num_bytes, answer))
    assert not wrong


@needs_cudnn
@pytest.mark.skipif(not IS_PINNED, reason="with other releases, the frontend leaves out others")
@pytest.mark.parametrize("kernel", ConvolutionKernel)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nvidias_frontend_answers_the_same(kernel: ConvolutionKernel, dtype: str) -> None:
    """With TF32 and without, in both layouts: the workspaces of the first plans, in order.

    Further down, the frontend leaves out a few engines that cuDNN lists.
    """
    frontend = pytest.importorskip("cudnn")
    for settings in ({}, {"allows_tf32": False, "is_deterministic": True}):
        asked = plans(**settings)
        for is_last in (False, True):
            convolution = dataclasses.replace(
                question(kernel), dtype=dtype, is_channels_last=is_last
            )
            expected = frontends_workspaces(frontend, asked, convolution)[:NUM_COMPARED]
            found = [
                asked.workspace_bytes(dataclasses.replace(convolution, rank=rank))
                for rank in range(len(expected))
            ]
            assert found == expected
            tried = dataclasses.replace(convolution, tries_plans=True)
            in_order = all_ranks(asked, convolution)
            assert asked.workspace_bytes(tried) == max(in_order)
            assert max(in_order) >= max(expected)


def all_ranks(asked: CudnnPlans, convolution: Convolution) -> list[int]:
    """Return the workspaces of all plans, in the order of cuDNN's lists."""
    found: list[int] = []
    while True:
        num_bytes = asked.workspace_bytes(dataclasses.replace(convolution, rank=len(found)))
        if num_bytes is None:
            return found
        found.append(num_bytes)


def frontends_workspaces(cudnn: Any, asked: CudnnPlans, convolution: Convolution) -> list[int]:
    """Return the workspaces of all plans that NVIDIA's frontend for Python can build."""
    kind = {"float32": cudnn.data_type.FLOAT, "bfloat16": cudnn.data_type.BFLOAT16}
    found = []
    for mode in (cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK):
        graph = cudnn.pygraph(
            io_data_type=kind[convolution.dtype],
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            device_property=cudnn.create_device_properties(asked.properties),
        )

        def tensor(name: str, shape: tuple[int, ...], graph: Any = graph) -> Any:
            memory_format = (
                torch.channels_last if convolution.is_channels_last else torch.contiguous_format
            )
            like = torch.empty(shape, device="meta").to(memory_format=memory_format)
            return graph.tensor(
                name=name,
                dim=list(shape),
                stride=list(like.stride()),
                data_type=kind[convolution.dtype],
            )

        ways: dict[ConvolutionKernel, tuple[Any, dict[str, Any], tuple[int, ...]]] = {
            ConvolutionKernel.FORWARD: (
                graph.conv_fprop,
                {"image": convolution.input_shape, "weight": convolution.weight_shape},
                convolution.output_shape,
            ),
            ConvolutionKernel.DATA: (
                graph.conv_dgrad,
                {"loss": convolution.output_shape, "filter": convolution.weight_shape},
                convolution.input_shape,
            ),
            ConvolutionKernel.FILTER: (
                graph.conv_wgrad,
                {"image": convolution.input_shape, "loss": convolution.output_shape},
                convolution.weight_shape,
            ),
        }
        way, shapes, made_shape = ways[convolution.kernel]
        made = way(
            **{name: tensor(name, shape) for name, shape in shapes.items()},
            padding=list(convolution.padding),
            stride=list(convolution.stride),
            dilation=list(convolution.dilation),
        )
        like = tensor("like", made_shape)
        made.set_output(True).set_dim(list(made_shape)).set_stride(like.get_stride())
        made.set_data_type(kind[convolution.dtype])
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([mode])
        notes = cudnn.numerical_note
        left_out = [notes.NONDETERMINISTIC] * asked.settings.is_deterministic
        if convolution.dtype == "float32":
            left_out += [notes.DOWN_CONVERT_INPUTS]
            left_out += [notes.TENSOR_CORE] * (not asked.settings.allows_tf32)
        graph.deselect_numeric_notes(left_out)
        for index in range(graph.get_execution_plan_count()):
            try:
                graph.build_plan_at_index(index)
            except (cudnn.cudnnGraphNotSupportedError, RuntimeError):
                continue
            found.append(int(graph.get_workspace_size_plan_at_index(index)))
    return found


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


def test_a_system_without_cudnn_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason says what does not load, or that torch has none."""

    def missing() -> None:
        raise OSError("libcudnn.so.9: cannot open shared object file")

    monkeypatch.setattr(module, "load_cudnn", missing)
    missing_cudnn.cache_clear()
    try:
        reason = missing_cudnn()
        assert cudnn_plans((8, 6)) is None
    finally:
        missing_cudnn.cache_clear()
    assert reason is not None
    assert "libcudnn.so.9" in reason or "not built for CUDA" in reason


@needs_cudnn
def test_plans_have_an_order() -> None:
    """torch goes on to the next plan where a workspace finds no room; the last ones need little."""
    asked = plans()
    in_order = all_ranks(asked, question())
    assert in_order[0] == asked.workspace_bytes(question())
    assert len(in_order) > 2
    assert min(in_order) < in_order[0]


@needs_cudnn
def test_cards_that_differ_have_names_that_differ() -> None:
    """cuDNN remembers a card by its name: a second one of that name would be the first one."""
    names = {
        json.loads(CudnnPlans(capability, PlanSettings(), multiprocessors).properties)["deviceName"]
        for capability, multiprocessors in (
            ((7, 5), 40),
            ((7, 5), 68),
            ((8, 6), None),
            ((10, 0), 148),
        )
    }
    assert len(names) == 4


@needs_cudnn
def test_a_cudnn_that_crashes_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN 9.10 reads a handle that is not there when it is asked for a B200."""
    monkeypatch.setattr(CudnnPlans, "version", 91002)
    assert cudnn_plans((10, 0)) is None
    assert cudnn_plans((9, 0)) is not None
