"""Simulation runs without Linux, in a process that has only what Windows has."""

from __future__ import annotations

import subprocess
import sys
import textwrap

_WITHOUT_LINUX = """
    import ctypes, os, signal, sys

    import psutil, torch, timm  # what these need of the system is not memfit's

    for name in ("resource", "fcntl", "termios"):
        sys.modules[name] = None
    for name in ("fork", "uname", "killpg", "setpgid", "waitstatus_to_exitcode"):
        if hasattr(os, name):
            delattr(os, name)

    real_library = ctypes.CDLL

    def library(name, *args, **kwargs):
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        return real_library(name, *args, **kwargs)

    ctypes.CDLL = library
    sys.platform = "win32"
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that believes that it is on Windows."""
    program = textwrap.dedent(_WITHOUT_LINUX) + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300
    )


def test_simulation_needs_nothing_of_linux() -> None:
    """An estimate, a plan, a profile and a verification run; a CPU's trials get a sentence."""
    ran = run(
        """
        import memfit
        print(memfit.estimate("test_vit", 2, gpu="rtx3090").outcome.value)
        print(memfit.profile("test_vit", 2, gpu="rtx3090").outcome.value)
        print(memfit.profile("test_vit", 2, device="cpu").outcome.value)
        try:
            memfit.probe("test_vit", device="cpu")
        except memfit.UnsupportedError as error:
            print(str(error)[:30])
        """
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["fits", "fits", "fits", "Trials on a CPU need Linux, be"]
