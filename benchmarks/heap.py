"""How glibc's heap changes the memory of a training step, and what fixing its threshold costs.

    python benchmarks/heap.py

The same steps run in fresh processes: with unchanged glibc, and with its mmap threshold fixed at
the value it starts with. Prints the spread of the peaks over the runs, and the ratio of the times.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FIXED = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
CASES = (("resnet18", 224, 16), ("resnet10t", 176, 32), ("test_vit", 160, 128))
NUM_STEPS = 6


def status_mib(key: str) -> float:
    """Return a figure of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def measure(name: str, image_size: int, batch_size: int) -> dict[str, float]:
    """Train for a few steps; return the peak beyond the loaded process and the fastest step."""
    import timm
    import torch

    torch.ones(torch.get_num_threads() * 2**20).add_(1)
    loaded = status_mib("VmSize")
    model = timm.create_model(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seconds = []
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        images = torch.randn(batch_size, 3, image_size, image_size)
        classes = torch.randint(1000, (batch_size,))
        torch.nn.functional.cross_entropy(model(images), classes).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return {"peak_mib": status_mib("VmPeak") - loaded, "seconds": min(seconds)}


def in_process(case: tuple[str, int, int], environment: dict[str, str]) -> dict[str, Any]:
    """Measure in a fresh process with that environment."""
    command = [sys.executable, __file__, "--case", *map(str, case)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | environment
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        name, image_size, batch_size = arguments.case
        print(json.dumps(measure(name, int(image_size), int(batch_size))))
        return
    import timm
    import torch

    print(
        f"fp32, SGD with momentum, {arguments.runs} runs of {NUM_STEPS} steps each; "
        f"{os.cpu_count()} CPU cores, torch {torch.__version__}, timm {timm.__version__}, "
        f"{dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}.\n"
    )
    print("| model | px | batch | peak, MiB | peak fixed, MiB | time, fixed / not |")
    print("|---|---|---|---|---|---|")
    for case in CASES:
        # The two take turns, so that other work on the machine slows both.
        pairs = [(in_process(case, {}), in_process(case, FIXED)) for _ in range(arguments.runs)]
        loose = [pair[0]["peak_mib"] for pair in pairs]
        fixed = [pair[1]["peak_mib"] for pair in pairs]
        ratio = statistics.median(pair[1]["seconds"] / pair[0]["seconds"] for pair in pairs)
        name, image_size, batch_size = case
        print(
            f"| {name} | {image_size} | {batch_size} | {min(loose):.0f} to {max(loose):.0f} "
            f"| {min(fixed):.0f} to {max(fixed):.0f} | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
