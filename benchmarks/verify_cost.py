"""How long does `memfit verify` take, and how much memory?

    python benchmarks/verify_cost.py [MODEL ...]

Each model is verified on the CPU as README shows it, in 4 micro-batches of 8, in a process of its
own. The time is the whole command's: by the clock, and of all cores together. The memory is the
most that its process held (resident).
"""

from __future__ import annotations

import datetime as dt
import os
import platform
import subprocess
import sys
import time

import timm
import torch

from memfit.units import GIB

ARGUMENTS = ("--micro-batch", "8", "--accumulation-steps", "4", "--device", "cpu")


def main() -> None:
    """Print the table for the models asked for, or for resnet50."""
    print(
        f"{platform.machine()}, {os.cpu_count()} CPU cores, torch {torch.__version__}, "
        f"timm {timm.__version__}, {dt.datetime.now(dt.timezone.utc):%Y-%m-%d}\n"
    )
    print("| model | exit code | seconds | CPU seconds | GiB |\n|---|--:|--:|--:|--:|", flush=True)
    for model in sys.argv[1:] or ["resnet50"]:
        code, seconds, cpu_seconds, peak_bytes = _cost(model)
        print(
            f"| {model} | {code} | {seconds:.0f} | {cpu_seconds:.0f} | {peak_bytes / GIB:.1f} |",
            flush=True,
        )


def _cost(model: str) -> tuple[int, float, float, int]:
    """Verify a model.

    Returns:
        The exit code, the seconds by the clock and of all cores, and the peak of the process's
        memory.
    """
    start = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-m", "memfit", "verify", model, *ARGUMENTS],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return child.returncode, seconds, cpu_seconds, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
