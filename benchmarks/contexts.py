"""Measure what a process holds on a GPU beside the caching allocator, after different steps.

    python benchmarks/contexts.py [--json FILE]

It is the CUDA context, the kernels that were loaded, and what libraries keep for themselves. Each
case runs in a process of its own. NVML says what the process holds, and torch what its allocator
reserved; the difference is printed. So other processes on the card do not matter.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MIB = 2**20
CASES = {
    "nothing but the context": {},
    "vit_base_patch16_224, fp32": {"model": "vit_base_patch16_224", "precision": "fp32"},
    "vit_base_patch16_224, amp-bf16": {"model": "vit_base_patch16_224", "precision": "amp-bf16"},
    "resnet50, fp32": {"model": "resnet50", "precision": "fp32"},
    "resnet50, amp-bf16": {"model": "resnet50", "precision": "amp-bf16"},
    "resnet50, amp-bf16, channels-last": {
        "model": "resnet50",
        "precision": "amp-bf16",
        "channels_last": True,
    },
    "convnext_tiny, amp-fp16": {"model": "convnext_tiny", "precision": "amp-fp16"},
    "maxvit_tiny_tf_224, amp-bf16": {"model": "maxvit_tiny_tf_224", "precision": "amp-bf16"},
    "resnet50, amp-bf16, compiled": {
        "model": "resnet50",
        "precision": "amp-bf16",
        "compiled": True,
    },
}
BATCH_SIZES = (8, 64)
NUM_ITERATIONS = 3


def main() -> None:
    """Run each case in a process, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures here")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        print(json.dumps(measured(**CASES[arguments.case])))
        return
    import pynvml
    import torch

    if not torch.cuda.is_available():
        sys.exit("This needs a CUDA device, and torch sees none.")
    pynvml.nvmlInit()
    machine = {
        "card": torch.cuda.get_device_name(),
        "total_bytes": torch.cuda.get_device_properties(0).total_memory,
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "date": str(dt.datetime.now(tz=dt.timezone.utc).date()),
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()), end="\n\n")
    print("| case | beside the allocator, MiB | reserved by it, MiB |\n|---|---|---|")
    cases = {}
    for case in CASES:
        run = subprocess.run(
            [sys.executable, __file__, "--case", case], capture_output=True, text=True, check=False
        )
        if run.returncode:
            print(f"| {case} | failed: {run.stderr.strip().splitlines()[-1:]} | |")
            continue
        cases[case] = found = json.loads(run.stdout.splitlines()[-1])
        beside, reserved = found["beside_bytes"] / MIB, found["reserved_bytes"] / MIB
        print(f"| {case} | {beside:.0f} | {reserved:.0f} |", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**machine, "cases": cases}, indent=1) + "\n")


def measured(
    model: str | None = None, *, compiled: bool = False, **options: Any
) -> dict[str, int | None]:
    """Take training steps, and return what this process holds."""
    import pynvml
    import torch

    device = torch.device("cuda")
    torch.empty(1, device=device)
    if model is not None:
        _train(model, device, compiled=compiled, **options)
    torch.cuda.synchronize()
    pynvml.nvmlInit()
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
    (here,) = [process for process in processes if process.pid == os.getpid()]
    reserved = torch.cuda.memory_reserved(device)
    return {
        "beside_bytes": here.usedGpuMemory - reserved,
        "reserved_bytes": reserved,
        "held_bytes": here.usedGpuMemory,
    }


def _train(model: str, device: Any, *, compiled: bool, **options: Any) -> None:
    import torch

    from memfit.records import Precision, StepOptions
    from memfit.step.training_step import TrainingStep

    options["precision"] = Precision(options["precision"])
    step = TrainingStep(subject=model, options=StepOptions(optimizer="adamw", **options))
    prepared = step.prepare(device)
    if compiled:
        prepared.model = torch.compile(prepared.model)
    prepared.begin()
    for batch_size in BATCH_SIZES:
        for _ in range(NUM_ITERATIONS):
            prepared.iterate(batch_size)


if __name__ == "__main__":
    main()
