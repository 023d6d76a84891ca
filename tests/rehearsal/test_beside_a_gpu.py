"""A rehearsal on a machine that has a GPU: another card, and the real one is not touched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memfit.cards import find_gpu
from memfit.rehearsal.activate import rehearsed_environment

pytestmark = [pytest.mark.gpu, pytest.mark.computes]

SCRIPT = """
import json, os, sys, torch
model = torch.nn.Linear(4096, 4096).cuda()
model(torch.randn(64, 4096, device="cuda")).sum().backward()
free, total = torch.cuda.mem_get_info()
print(json.dumps({"name": torch.cuda.get_device_name(), "total": total}), flush=True)
sys.stdin.readline()
"""


def test_it_rehearses_another_card_and_the_real_one_has_no_such_process(tmp_path: Path) -> None:
    """NVML on the real driver lists this process and not the rehearsed one."""
    import pynvml
    import torch

    torch.empty(1, device="cuda")
    card = find_gpu("RTX 3060")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, **rehearsed_environment(card, environment=os.environ)}
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    with subprocess.Popen(
        [sys.executable, str(script)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        seen = json.loads(child.stdout.readline())
        pids = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
        child.stdin.write("\n")
    assert child.returncode == 0
    assert seen == {"name": card.name, "total": card.total_bytes}
    assert os.getpid() in pids
    assert child.pid not in pids


def test_a_command_is_rehearsed_on_another_card(tmp_path: Path) -> None:
    """`memfit rehearse` names the card that was asked for, and calls its figures rehearsed."""
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "model = torch.nn.Linear(4096, 4096).cuda()\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "for _ in range(5):\n"
        "    model(torch.randn(64, 4096, device='cuda')).sum().backward()\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad()\n"
    )
    command = [sys.executable, "-m", "memfit", "rehearse", "--gpu", "RTX 3060", "--json"]
    run = subprocess.run(
        [*command, "--", sys.executable, str(script)], capture_output=True, text=True, check=True
    )
    result = json.loads(run.stdout[run.stdout.index("{") :])
    (found,) = result["results"]
    assert found["device"] == find_gpu("RTX 3060").name
    assert found["source"] == "rehearsed"
