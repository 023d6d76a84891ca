"""A rehearsed process ends with its own status, whatever its libraries' threads do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from memfit.cards import find_gpu
from memfit.rehearsal.activate import rehearsed_environment

from .conftest import Rehearsed

ENDS_IN_TERMINATE = """
import ctypes, sys
terminate = ctypes.CDLL("libstdc++.so.6")._ZSt9terminatev
ctypes.CDLL(None).__cxa_atexit(terminate, None, None)
print("done", flush=True)
sys.exit(3)
"""


@pytest.mark.rehearses
def test_a_thread_that_is_left_at_the_end_changes_nothing() -> None:
    """A thread is left, so C++ calls std::terminate. The process keeps its own exit status."""
    added = rehearsed_environment(find_gpu("rtx3060"), environment=os.environ)
    run = subprocess.run(
        [sys.executable, "-c", ENDS_IN_TERMINATE],
        env={**os.environ, **added},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (3, "done\n", "")


def test_backward_may_still_run_when_python_ends(rehearsed: Rehearsed) -> None:
    """Autograd's thread asks for Python's lock when Python has begun to end."""
    rehearsed("""
    import threading, time
    inside = threading.Event()

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, gradient):
            inside.set()
            time.sleep(0.3)
            return gradient

    class Last:
        def __del__(self):
            time.sleep(0.6)

    values = torch.zeros(3, device="cuda", requires_grad=True)
    threading.Thread(target=lambda: Slow.apply(values).sum().backward(), daemon=True).start()
    inside.wait()
    sys.last = Last()
    answer()
    """)
