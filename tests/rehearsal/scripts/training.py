"""Trains a product of two layers, without any library of NVIDIA.

Its arguments: samples, steps, and what else to do.
"""

from __future__ import annotations

import atexit
import math
import os
import signal
import subprocess
import sys

import torch
from torch import nn

SAMPLES, STEPS, *EXTRAS = sys.argv[1:]


class Scale(nn.Module):
    """Multiplies each number by its own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1024, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).relu()


class Net(nn.Module):
    """Two layers that scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Scale()
        self.second = Scale()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(x)).sum()
        return result


def say_peak() -> None:
    """Print the peaks that the script itself reads."""
    print("peak", torch.cuda.max_memory_allocated(), flush=True)


def read(x: torch.Tensor, loss: torch.Tensor) -> None:
    """Read values, if that was asked for."""
    if "read" in EXTRAS:
        print("loss", loss.item(), loss)
        if loss.item() > 1:
            x = x[:1]
        x[x > 3].sum()
    if "divide" in EXTRAS:
        print("signal to noise", math.log10(1 / loss.item()), 1 / float(loss))
        count = (x > 3).sum().item()
        print("share", 1 / count)


def main() -> None:
    net = Net().cuda()
    optimizer = torch.optim.AdamW(net.parameters())
    if "save" in EXTRAS:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    atexit.register(say_peak)
    if "orphan" in EXTRAS:
        subprocess.Popen(["sleep", "612.5"], start_new_session=True)  # noqa: S607
    for step in range(int(STEPS)):
        x = torch.ones(int(SAMPLES), 1024, 256, device="cuda")
        try:
            loss = net(x)
        except torch.OutOfMemoryError:
            if "retry" not in EXTRAS:
                raise
            loss = net(x[:1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if "reset" in EXTRAS and step == 0:
            say_peak()
            torch.cuda.reset_peak_memory_stats()
        read(x, loss)
        if "wait" in EXTRAS:
            print("stepped", flush=True)
    if "evaluate" in EXTRAS:
        net.eval()
        with torch.no_grad():
            net(torch.ones(4 * int(SAMPLES), 1024, 256, device="cuda"))
    if "quit" in EXTRAS:
        os._exit(5)
    if "crash" in EXTRAS:
        os.abort()
    if "fail" in EXTRAS:
        raise ValueError("a fault of the script's own")


main()
