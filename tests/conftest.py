"""Small real objects that many tests train."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pinned import IS_PINNED
from timm.layers import set_fused_attn, use_fused_attn
from torch import nn

from memfit import Workload
from memfit.cards import find_gpu, is_rehearsed
from memfit.errors import UnsupportedError
from memfit.rehearsal.activate import rehearsed_environment, show_driver
from memfit.simulation.cudnn.backend_api import bring_driver_with

# As `memfit.api` does, which some tests do not import.
bring_driver_with(show_driver)
# Named cards are simulated here; the tests of the rehearsal ask for a rehearsal.
os.environ["MEMFIT_ENGINE"] = "simulate"
# The steps are small, so several threads would only wait for each other on a busy machine.
torch.set_num_threads(1)
# Processes in the background of a shell ignore interrupts, but some tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, the tests for which this system lacks something."""
    for item in items:
        reason = _why_skipped(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_skipped(item: pytest.Item) -> str | None:
    """Return what this system lacks for a test; `None` if nothing."""
    for mark in item.iter_markers("needs"):
        missing = [module for module in mark.args if not _is_installed(module)]
        if missing:
            return f"{missing[0]} is not installed"
    # These fixtures rehearse, so a test that uses one needs no mark.
    if "rehearses" in item.keywords or {"rehearsed", "run_rehearsed"} & _fixtures_of(item):
        cannot_rehearse = _why_not_rehearsed()
        if cannot_rehearse is not None:
            return cannot_rehearse
    if "gpu" not in item.keywords:
        return None
    if not torch.cuda.is_available():
        return "needs a CUDA device; tests/rehearsal/test_gpu_tests.py rehearses one"
    if is_rehearsed() and "long" in item.keywords:
        return "a rehearsal runs others like it"
    if is_rehearsed() and "computes" in item.keywords:
        return "needs values that no kernel has computed"
    return None


def _fixtures_of(item: pytest.Item) -> set[str]:
    return set(getattr(item, "fixturenames", ()))


@functools.cache
def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def _why_not_rehearsed() -> str | None:
    """Return why no card can be rehearsed here; `None` if cards can be."""
    try:
        rehearsed_environment(find_gpu("rtx3060"))
    except UnsupportedError as error:
        return str(error)
    return None


RunRehearsed = Callable[[Path, str], Any]
"""What the fixture gives: runs a script on a rehearsed card, and returns what it wrote."""


@pytest.fixture(scope="session")
def run_rehearsed(tmp_path_factory: pytest.TempPathFactory) -> RunRehearsed:
    """Run a script that writes JSON into the file that it is given."""

    def run(script: Path, card: str) -> Any:
        try:
            added = rehearsed_environment(find_gpu(card), environment=os.environ)
        except UnsupportedError as error:
            if IS_PINNED:
                raise  # Every card is rehearsed with the pinned releases.
            pytest.skip(f"this torch cannot rehearse the card: {error}")
        file = tmp_path_factory.mktemp("rehearsed") / "written.json"
        subprocess.run(
            [sys.executable, "-W", "ignore", str(script), str(file)],
            env={**os.environ, **added},
            check=True,
            timeout=120,
        )
        return json.loads(file.read_text())

    return run


class SmallNet(nn.Module):
    """A convolution, a batch norm, dropout and a classifier: all that a step can change."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1)
        )
        self.head = nn.Linear(8, 10)
        self.num_calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return class scores of shape (samples, 10) for images of shape (samples, 3, H, W)."""
        self.num_calls += 1
        scores: torch.Tensor = self.head(self.features(images).mean((2, 3)))
        return scores


def small_workload(image_size: int = 32) -> Workload:
    """Return a CNN with batch norm, and an optimizer that has taken a step."""
    torch.manual_seed(0)
    model = SmallNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = (torch.randn(4, 3, image_size, image_size), torch.randint(10, (4,)))
    workload = Workload(model, batch, nn.functional.cross_entropy, optimizer)
    workload.loss(model(batch[0]), batch[1]).backward()
    optimizer.step()
    return workload


@pytest.fixture
def workload() -> Workload:
    """Return a CNN with batch norm, and an optimizer that has taken a step."""
    return small_workload()


@pytest.fixture
def attention_written_out() -> Iterator[None]:
    """Tell timm not to use fused attention."""
    was_fused = use_fused_attn()
    set_fused_attn(False)
    yield
    set_fused_attn(was_fused)
