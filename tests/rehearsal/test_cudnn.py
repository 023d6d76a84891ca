"""cuDNN on a rehearsed card chooses its plans and workspaces, and the same ones each time."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from memfit.cards import Gpu, find_gpu
from memfit.rehearsal.activate import rehearsed_environment
from memfit.rehearsal.run import rehearse_command
from memfit.simulation.cudnn.backend_api import FORWARD, Descriptors, load_cudnn
from memfit.simulation.cudnn.plans import CudnnPlans, PlanSettings
from memfit.simulation.cudnn.questions import Convolution, ConvolutionKernel

from .conftest import Rehearsed

_CONVOLUTIONS = """
def workspace(dtype, memory_format):
    layer = torch.nn.Conv2d(64, 64, 3, padding=1, bias=False).to("cuda", dtype)
    layer.to(memory_format=memory_format)
    images = torch.empty(64, 64, 56, 56, device="cuda", dtype=dtype, memory_format=memory_format)
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        out = layer(images)
    stats = torch.cuda.memory_stats()
    return stats["requested_bytes.all.peak"] - stats["requested_bytes.all.current"]
answer(workspaces=[
    workspace(dtype, memory_format)
    for dtype in (torch.float16, torch.float32)
    for memory_format in (torch.contiguous_format, torch.channels_last)
])
"""

_TRAINED = """
def workspaces(images, weight, stride, padding, groups, dtype):
    x = torch.empty(images, device="cuda", dtype=dtype)
    w = torch.empty(weight, device="cuda", dtype=dtype)
    rest = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups)
    def taken(function):
        before = torch.cuda.memory_stats()["requested_bytes.all.allocated"]
        made = function()
        after = torch.cuda.memory_stats()["requested_bytes.all.allocated"]
        kept = sum(t.nbytes for t in made if t is not None)
        return after - before - kept
    forward = taken(lambda: [torch.ops.aten.convolution(x, w, None, *rest)])
    y = torch.ops.aten.convolution(x, w, None, *rest)
    backward = torch.ops.aten.convolution_backward
    masks = ([True, False, False], [False, True, False])
    return [forward, *(taken(lambda: backward(y, x, w, [0], *rest, mask)) for mask in masks)]
answer(workspaces=[
    workspaces(*shapes, getattr(torch, dtype)) for shapes in SHAPES for dtype in DTYPES
])
"""

_BENCHMARK = """
torch.backends.cudnn.benchmark = True
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 64, 7, 2), torch.nn.Conv2d(64, 128, 3), torch.nn.Conv2d(128, 64, 1)
).cuda()
with torch.autocast("cuda", dtype=torch.bfloat16):
    loss = model(torch.zeros(16, 3, 96, 96, device="cuda")).sum()
loss.backward()
answer(stats={k: v for k, v in torch.cuda.memory_stats().items() if "bytes.all" in k})
"""

_SEARCHED = """
torch.backends.cudnn.benchmark = True
x = torch.empty(768, 224, 144, 144, device="cuda", dtype=torch.half)
w = torch.empty(224, 112, 3, 3, device="cuda", dtype=torch.half)
with torch.no_grad():
    y = torch.nn.functional.conv2d(x, w, stride=2, padding=1, groups=2)
peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
answer(searched=peak - x.nbytes - w.nbytes - y.nbytes)
"""

_RECURRENT = """
def kept(kind, **options):
    layer = kind(123, 320, 4, **options).cuda()
    images = torch.zeros(250, 100, 123, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    out, _ = layer(images)
    after = torch.cuda.memory_stats()
    kept = after["requested_bytes.all.current"]
    out.sum().backward()
    return kept - before, after["requested_bytes.all.peak"] - kept, list(out.shape)
lengths = torch.full((4,), 20, dtype=torch.int32)
probabilities = torch.zeros(20, 4, 9, device="cuda").log_softmax(2).requires_grad_()
labels = torch.ones(12, dtype=torch.int32)
loss = torch.nn.functional.ctc_loss(probabilities, labels, [20] * 4, [3] * 4)
loss.backward()
answer(
    lstm=kept(torch.nn.LSTM), gru=kept(torch.nn.GRU), rnn=kept(torch.nn.RNN),
    both=kept(torch.nn.LSTM, bidirectional=True, dropout=0.1)[2],
    projected=kept(torch.nn.LSTM, proj_size=32)[2], ctc=list(probabilities.grad.shape),
)
"""


@pytest.mark.needs("nvidia.cudnn")
def test_convolutions_take_the_workspaces_that_cudnn_says_for_the_card(
    rehearsed: Rehearsed,
) -> None:
    """cuDNN gives the same bytes when it is asked without torch, and other bytes by card."""
    seen = {}
    for name in ("T4", "H100"):
        workspaces = rehearsed(_CONVOLUTIONS, gpu=name)["workspaces"]
        card = find_gpu(name)
        expected = [
            _asked_of_cudnn(card, data_type=data_type, is_channels_last=is_channels_last)
            for data_type in (2, 0)  # half, float
            for is_channels_last in (False, True)
        ]
        assert workspaces == expected
        seen[name] = workspaces
    assert len({tuple(workspaces) for workspaces in seen.values()}) == 2


@pytest.mark.needs("nvidia.cudnn")
def test_both_work_out_the_same_split_sums_for_a_hopper(rehearsed: Rehearsed) -> None:
    """The rehearsed library's rule is the simulation's, for all kinds of kernels."""
    shapes = (
        ((32, 64, 56, 56), (64, 64, 3, 3), 1, 1, 1),
        ((32, 512, 14, 14), (512, 512, 3, 3), 2, 1, 1),
        ((4, 512, 28, 28), (512, 512, 3, 3), 1, 1, 1),
        ((32, 96, 56, 56), (192, 96, 2, 2), 2, 0, 1),
        ((32, 216, 28, 28), (216, 24, 3, 3), 1, 1, 9),
        ((16, 512, 28, 28), (1024, 512, 1, 1), 2, 0, 1),
    )
    dtypes = ("float32", "bfloat16", "float16")
    script = f"SHAPES, DTYPES = {shapes!r}, {dtypes!r}\n{_TRAINED}"
    gpu = find_gpu("H100")
    whole = CudnnPlans(gpu.compute_capability, PlanSettings(), gpu.multiprocessors)
    described = CudnnPlans(gpu.compute_capability, PlanSettings())
    asked = [
        _question(kernel, dtype, case)
        for case in shapes
        for dtype in dtypes
        for kernel in ConvolutionKernel
    ]
    seen = rehearsed(script, gpu="H100")["workspaces"]
    assert [number for case in seen for number in case] == [
        whole.workspace_bytes(question) for question in asked
    ]
    differ = [q for q in asked if whole.workspace_bytes(q) != described.workspace_bytes(q)]
    assert {q.kernel for q in differ} == set(ConvolutionKernel)


def test_a_benchmark_takes_the_same_plans_every_time(rehearsed: Rehearsed) -> None:
    """Time decides nothing, so two processes end with the same allocator statistics."""
    first = rehearsed(_BENCHMARK, gpu="RTX 3090")
    assert rehearsed(_BENCHMARK, gpu="RTX 3090") == first


@pytest.mark.needs("nvidia.cudnn")
def test_a_search_makes_room_for_the_largest_of_all_plans(rehearsed: Rehearsed) -> None:
    """It times ten of them (`benchmark_limit`), and the largest may come later."""
    question = _question(
        ConvolutionKernel.FORWARD, "float16", ((768, 224, 144, 144), (224, 112, 3, 3), 2, 1, 2)
    )
    plans = CudnnPlans((8, 9), PlanSettings())
    first = [
        plans.workspace_bytes(dataclasses.replace(question, rank=rank)) or 0 for rank in range(10)
    ]
    largest = plans.workspace_bytes(dataclasses.replace(question, tries_plans=True))
    assert rehearsed(_SEARCHED, gpu="RTX 4090")["searched"] == largest
    if plans.version == 92600:
        assert largest is not None
        assert largest > max(first)


def test_recurrent_layers_take_what_cudnn_takes(rehearsed: Rehearsed) -> None:
    """A layer keeps its output, its states and the reserve, and takes a workspace for the call.

    The reserves and workspaces were printed in pytorch/pytorch#2895.
    """
    seen = rehearsed(_RECURRENT)
    outputs, states = 4 * 25_000 * 320, 4 * 4 * 100 * 320
    # LSTM has two states, before and after.
    assert seen["lstm"][:2] == [outputs + 4 * states + 736_000_000, 17_730_560]
    assert seen["gru"][:2] == [outputs + 2 * states + 864_000_000, 13_169_920]
    assert seen["rnn"][2] == [250, 100, 320]
    assert (seen["both"], seen["projected"]) == ([250, 100, 640], [250, 100, 32])
    assert seen["ctc"] == [20, 4, 9]


# ---- cuDNN, asked without the rehearsed device


def _asked_of_cudnn(gpu: Gpu, *, data_type: int, is_channels_last: bool) -> int:
    """Return the workspace of the first plan of cuDNN's heuristics that can be built."""
    shape = (64, 64, 56, 56)
    strides = (64 * 56 * 56, 1, 56 * 64, 64) if is_channels_last else (64 * 56 * 56, 56 * 56, 56, 1)
    filters = (64 * 9, 1, 3 * 64, 64) if is_channels_last else (64 * 9, 9, 3, 1)
    with Descriptors(load_cudnn()) as cudnn:
        card = cudnn.card(_properties(gpu))
        tensors = (
            cudnn.tensor(1, data_type, shape, strides),
            cudnn.tensor(2, data_type, (64, 64, 3, 3), filters),
            cudnn.tensor(3, data_type, shape, strides),
        )
        graph = cudnn.graph(FORWARD, tensors, padding=(1, 1), stride=(1, 1), dilation=(1, 1))
        for mode in (3, 2):  # A, fallback
            for config in cudnn.configs(cudnn.heuristics(graph, card, mode), 16):
                num_bytes = cudnn.workspace_bytes(config, card)
                if num_bytes is not None:
                    return num_bytes
    raise AssertionError("cuDNN has no plan")


def _question(
    kernel: ConvolutionKernel,
    dtype: str,
    case: tuple[tuple[int, ...], tuple[int, ...], int, int, int],
) -> Convolution:
    images, weight, stride, padding, _ = case
    size = ((side + 2 * padding - weight[2]) // stride + 1 for side in images[2:])
    return Convolution(
        kernel=kernel,
        dtype=dtype,
        is_channels_last=False,
        input_shape=images,
        weight_shape=weight,
        output_shape=(images[0], weight[0], *size),
        padding=(padding, padding),
        stride=(stride, stride),
        dilation=(1, 1),
    )


def _properties(gpu: Gpu) -> str:
    """Return a card's properties. deviceVer and, on a T4, multiProcessorCount decide workspaces."""
    is_turing = gpu.compute_capability == (7, 5)
    values = {
        "deviceVer": gpu.compute_capability[0] * 100 + gpu.compute_capability[1] * 10,
        "multiProcessorCount": gpu.multiprocessors,
        "warpSize": 32,
        "maxSharedMemoryPerBlock": 49152,
        "maxSharedMemoryPerBlockOptin": 65536 if is_turing else 101376,
        "reservedSharedMemoryPerBlock": 1024,
        "maxRegistersPerSM": 65536,
        "maxCtasPerSM": 16,
        "maxThreadsPerBlock": 1024,
        "maxThreadsPerSM": 1024,
        "regsPerBlock": 65536,
        "totalGlobalMem": 16 << 30,
        "smClockRateKHz": 1500000,
        "l2CacheSize": 6 << 20,
        "maxBlockSize": [1024, 1024, 64],
        "memClockRateKHz": 9000000,
        "maxGridSize": [2147483647, 65535, 65535],
        "supportCoopLaunch": 1,
        "pciDeviceId": 0,
        "isTccDriver": 0,
        "cudaDeviceId": 0,
        "driverVer": 12080,
        "deviceName": "any",
    }
    return json.dumps(values)


@pytest.mark.rehearses
@pytest.mark.parametrize("searches", [False, True])
def test_the_report_says_which_plan_a_search_takes(
    tmp_path: Path,
    searches: bool,
) -> None:
    """Here the first plan wins every time, and on a card the fastest one."""
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        f"torch.backends.cudnn.benchmark = {searches}\n"
        "model = torch.nn.Conv2d(3, 8, 3).cuda()\n"
        "optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
        "model(torch.zeros(2, 3, 8, 8, device='cuda')).sum().backward()\n"
        "optimizer.step()\n"
    )
    command = [sys.executable, str(script)]
    card = find_gpu("rtx3060")
    found = rehearse_command(command, card, rehearsed_environment(card))
    said = [note for note in found.rehearsal.notes if "cudnn.benchmark is on" in note]
    assert len(said) == searches
