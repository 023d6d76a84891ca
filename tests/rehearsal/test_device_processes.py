"""Processes, threads, forks and exits of a rehearsal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from memfit.cards import find_gpu
from memfit.rehearsal.activate import rehearsed_environment

from .conftest import Rehearsed


def test_workers_threads_and_forks(rehearsed: Rehearsed) -> None:
    """Workers can fork while the device is in use, and a fork that uses it gets torch's error."""
    seen = rehearsed("""
        import threading, warnings
        from torch.utils.data import DataLoader, TensorDataset
        # Python 3.12 warns of every fork of a process with threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        on_device = torch.ones(4).cuda()
        data = TensorDataset(torch.arange(64.0).view(64, 1))
        loader = DataLoader(data, batch_size=8, num_workers=2, pin_memory=True)
        batches = [batch for (batch,) in loader]
        total = sum(batch.cuda(non_blocking=True).cpu().sum().item() for batch in batches)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                torch.ones(1, device="cuda")
                word = "worked"
            except RuntimeError as exc:
                word = str(exc)
            count = ctypes.c_int(-1)
            status = device.cudaGetDeviceCount(ctypes.byref(count))
            os.write(writer, json.dumps([word, status]).encode())
            os._exit(0)
        os.waitpid(child, 0)
        word, status = json.loads(os.read(reader, 1000))

        wrong = []
        def work(number):
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(200):
                    values = torch.full((i * 100 + 1,), float(number))
                    kept = values.cuda()
                    (kept + 1).relu_()
                    if not torch.equal(kept.cpu(), values):
                        wrong.append(i)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 7)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        del on_device
        torch.cuda.empty_cache()
        answer(
            total=total, pinned=batches[0].is_pinned(), word=word, status=status, wrong=wrong,
            used=device.memfit_rehearsal_used_bytes(0),
        )
    """)

    assert seen["total"] == sum(range(64))
    assert seen["pinned"]
    assert "Cannot re-initialize CUDA in forked subprocess" in seen["word"]
    assert seen["status"] == 3
    assert seen["wrong"] == []
    assert seen["used"] == 0


@pytest.mark.rehearses
def test_visible_devices_are_chosen_as_by_the_driver() -> None:
    """CUDA_VISIBLE_DEVICES can hide one of two cards. A missing number still gets a card."""
    script = """
import ctypes
device = ctypes.CDLL("libcuda.so.1")
count, bus = ctypes.c_int(), ctypes.create_string_buffer(32)
device.cudaGetDeviceCount(ctypes.byref(count))
for i in range(count.value):
    device.cudaDeviceGetPCIBusId(bus, 32, i)
    print(bus.value.decode())
"""

    def buses(visible: str) -> list[str]:
        added = rehearsed_environment(find_gpu("RTX 3060"), num_gpus=2)
        run = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, **added, "CUDA_VISIBLE_DEVICES": visible},
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout.split()

    assert buses("1") == ["0000:02:00.0"]
    assert buses("1,0") == ["0000:02:00.0", "0000:01:00.0"]
    assert buses("3") == ["0000:04:00.0"]
    assert buses("GPU-6d656d66-6974-2d72-6568-656172736501") == ["0000:02:00.0"]
    assert buses("0,0") == buses("") == buses("none") == []


def test_training_ends_without_a_word(rehearsed: Rehearsed) -> None:
    """Threads, a profiler, tensors and graphs that are still there do not disturb the exit."""
    seen = rehearsed("""
        model = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.GELU()).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        scaler = torch.amp.GradScaler("cuda")
        torch.cuda.memory._record_memory_history(max_entries=1000)
        for _ in range(2):
            with torch.autocast("cuda", dtype=torch.float16):
                loss = model(torch.randn(16, 32, device="cuda")).float().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = torch.ones(8, device="cuda") * 2
        steps = [state["step"].shape for state in optimizer.state.values()]
        history = torch.cuda.memory._snapshot()["device_traces"][0]
        answer(num_states=len(steps), history=len(history))
    """)

    assert seen["num_states"] == 2
    assert seen["history"] > 10
