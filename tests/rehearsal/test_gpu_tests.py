"""The tests that need a GPU run on a rehearsed card."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memfit.cards import find_gpu
from memfit.rehearsal.activate import rehearsed_environment

ROOT = Path(__file__).parents[2]


@pytest.mark.rehearses
@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the tests run on it")
def test_what_needs_a_gpu_passes_rehearsed() -> None:
    """They run in one process, without those marked `computes` or `long`."""
    environment = {
        **os.environ,
        **rehearsed_environment(find_gpu("rtx3090"), num_gpus=2, environment=os.environ),
    }
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= 7
