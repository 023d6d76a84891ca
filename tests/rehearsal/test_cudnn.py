"""cuDNN on a rehearsed card chooses its plans and workspaces, and the same ones each time."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from memfit.cards import Gpu, find_gpu
from memfit.rehearsal.activate import rehearsed_environment
from memfit.rehearsal.run import rehearse_command

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


def test_a_benchmark_takes_the_same_plans_every_time(rehearsed: Rehearsed) -> None:
    """Time decides nothing, so two processes end with the same allocator statistics."""
    first = rehearsed(_BENCHMARK, gpu="RTX 3090")
    assert rehearsed(_BENCHMARK, gpu="RTX 3090") == first


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


# ---- cuDNN, asked without torch and without the rehearsed device

_BOOLEAN, _INT64, _DOUBLE, _DESCRIPTOR = 2, 3, 5, 15


class _Cudnn:
    """The backend API, called by ctypes. The numbers are those of cudnn_graph.h."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("nvidia.cudnn")
        assert spec is not None
        assert spec.submodule_search_locations
        folder = Path(next(iter(spec.submodule_search_locations)))
        self.library = ctypes.CDLL(str(folder / "lib" / "libcudnn.so.9"))

    def make(self, kind: int, *attributes: tuple[int, int, Sequence[object]]) -> ctypes.c_void_p:
        """Make a descriptor. Each of its attributes has a name, a type and values."""
        made = ctypes.c_void_p()
        self.check(self.library.cudnnBackendCreateDescriptor(kind, ctypes.byref(made)))
        for name, kind_of_value, values in attributes:
            self.set(made, name, kind_of_value, values)
        self.check(self.library.cudnnBackendFinalize(made))
        return made

    def set(self, made: ctypes.c_void_p, name: int, kind: int, values: Sequence[object]) -> None:
        types: dict[int, Any] = {
            _INT64: ctypes.c_int64,
            _DOUBLE: ctypes.c_double,
            _DESCRIPTOR: ctypes.c_void_p,
            _BOOLEAN: ctypes.c_bool,
            24: ctypes.c_char,
        }
        array = (types.get(kind, ctypes.c_int) * len(values))(*values)
        self.check(
            self.library.cudnnBackendSetAttribute(
                made, name, kind, ctypes.c_int64(len(values)), array
            )
        )

    def check(self, status: int) -> None:
        assert status == 0, f"cuDNN's status {status}"


def _asked_of_cudnn(gpu: Gpu, *, data_type: int, is_channels_last: bool) -> int:
    """Return the workspace of the first plan of cuDNN's heuristics that can be built."""
    cudnn = _Cudnn()
    shape = (64, 64, 56, 56)
    strides = (64 * 56 * 56, 1, 56 * 64, 64) if is_channels_last else (64 * 56 * 56, 56 * 56, 56, 1)
    filters = (64 * 9, 1, 3 * 64, 64) if is_channels_last else (64 * 9, 9, 3, 1)

    def tensor(number: int, sizes: Sequence[int], steps: Sequence[int]) -> ctypes.c_void_p:
        return cudnn.make(
            17,
            (900, _INT64, [16]),
            (901, 1, [data_type]),
            (902, _INT64, sizes),
            (903, _INT64, steps),
            (906, _INT64, [number]),
        )

    convolution = cudnn.make(
        1,
        (100, 1, [0]),
        (101, 7, [1]),
        (102, _INT64, [1, 1]),
        (103, _INT64, [1, 1]),
        (104, _INT64, [1, 1]),
        (105, _INT64, [1, 1]),
        (106, _INT64, [2]),
    )
    operation = cudnn.make(
        10,
        (704, _DESCRIPTOR, [tensor(1, shape, strides)]),
        (703, _DESCRIPTOR, [tensor(2, (64, 64, 3, 3), filters)]),
        (705, _DESCRIPTOR, [tensor(3, shape, strides)]),
        (702, _DESCRIPTOR, [convolution]),
        (700, _DOUBLE, [1.0]),
        (701, _DOUBLE, [0.0]),
    )
    graph = cudnn.make(15, (801, _DESCRIPTOR, [operation]))
    card = cudnn.make(38, (2702, 24, [bytes([c]) for c in _properties(gpu)]))
    for mode in (3, 2):  # A, fallback
        heuristics = cudnn.make(
            4, (201, _DESCRIPTOR, [graph]), (200, 8, [mode]), (204, _DESCRIPTOR, [card])
        )
        for config in _configs(cudnn, heuristics):
            plan = ctypes.c_void_p()
            cudnn.library.cudnnBackendCreateDescriptor(5, ctypes.byref(plan))
            cudnn.set(plan, 407, _DESCRIPTOR, [card])
            cudnn.set(plan, 401, _DESCRIPTOR, [config])
            if cudnn.library.cudnnBackendFinalize(plan) == 0:
                return _get(cudnn, plan, 402, _INT64)
    raise AssertionError("cuDNN has no plan")


def _configs(cudnn: _Cudnn, heuristics: ctypes.c_void_p) -> list[ctypes.c_void_p]:
    configs = (ctypes.c_void_p * 16)()
    for i in range(16):
        made = ctypes.c_void_p()
        cudnn.library.cudnnBackendCreateDescriptor(3, ctypes.byref(made))
        configs[i] = made.value
    count = ctypes.c_int64()
    cudnn.check(
        cudnn.library.cudnnBackendGetAttribute(
            heuristics, 202, _DESCRIPTOR, ctypes.c_int64(16), ctypes.byref(count), configs
        )
    )
    return [ctypes.c_void_p(configs[i]) for i in range(count.value)]


def _get(cudnn: _Cudnn, made: ctypes.c_void_p, name: int, kind: int) -> int:
    count, value = ctypes.c_int64(), ctypes.c_int64()
    cudnn.check(
        cudnn.library.cudnnBackendGetAttribute(
            made, name, kind, ctypes.c_int64(1), ctypes.byref(count), ctypes.byref(value)
        )
    )
    return value.value


def _properties(gpu: Gpu) -> bytes:
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
    return json.dumps(values).encode()


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
