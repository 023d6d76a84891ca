"""Children that rehearse a card: real torch, the real allocator, no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memfit.cards import find_gpu
from memfit.rehearsal.activate import rehearsed_environment
from memfit.units import parse_bytes

_PRELUDE = """
import ctypes, json, os, sys, torch
MIB, GIB = 2**20, 2**30
device = ctypes.CDLL("libcuda.so.1")
for name in "used peak free missing kept".split():
    getattr(device, f"memfit_rehearsal_{name}_bytes").restype = ctypes.c_uint64
for name in ("num_failures", "num_reads", "num_unknown_reads", "unknown_read_bytes"):
    getattr(device, f"memfit_rehearsal_{name}").restype = ctypes.c_uint64
def answer(**values):
    print(json.dumps(values))
"""

Rehearsed = Callable[..., Any]
"""What the fixture gives: a snippet, and the card as keywords."""


@pytest.fixture
def rehearsed(tmp_path: Path) -> Rehearsed:
    """Run a snippet on a rehearsed card and return what it gives to `answer`.

    The child must end with 0 and say nothing on standard error: a rehearsal ends without a word.
    """

    def run(
        snippet: str,
        *,
        gpu: str = "RTX 3060",
        memory: str | None = None,
        num_gpus: int = 1,
        others: str | None = None,
        variables: dict[str, str] | None = None,
    ) -> Any:
        card = find_gpu(gpu, total_bytes=None if memory is None else parse_bytes(memory))
        added = rehearsed_environment(
            card,
            num_gpus=num_gpus,
            others_bytes=0 if others is None else parse_bytes(others),
        )
        script = tmp_path / "script.py"
        script.write_text(_PRELUDE + textwrap.dedent(snippet))
        child = subprocess.run(
            [sys.executable, "-W", "ignore::FutureWarning", str(script)],
            env={**os.environ, **added, **(variables or {})},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (child.returncode, child.stderr) == (0, "")
        return json.loads(child.stdout.splitlines()[-1])

    return run
