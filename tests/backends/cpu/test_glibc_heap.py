"""glibc's heap, and the settings that trials need."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from typing import cast

import pytest

from memfit.backends.cpu import glibc_heap
from memfit.backends.cpu.backend import CpuBackend
from memfit.units import MIB


@pytest.mark.parametrize(
    ("variables", "is_tuned"),
    [
        ({}, False),
        ({"MALLOC_MMAP_THRESHOLD_": "65536"}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}, True),
        ({"LD_PRELOAD": "libjemalloc.so.2"}, True),
    ],
)
def test_a_heap_that_the_user_tuned_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], is_tuned: bool
) -> None:
    """Then training needs no setting either."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert glibc_heap.is_heap_tuned() is is_tuned
    assert bool(CpuBackend(memory_bytes=200 * MIB).environment) is not is_tuned


def test_a_filled_heap_has_no_holes() -> None:
    """The next request gets new memory, whatever any thread has freed before."""
    script = (
        "import ctypes, os, threading, time\n"
        "from memfit.backends.cpu import glibc_heap\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p\n"
        "libc.mallinfo2.restype = glibc_heap._HeapInfo\n"
        "libc.free.argtypes = [ctypes.c_void_p]\n"
        "def make_holes(step):\n"
        "    blocks = [libc.malloc(5000) for _ in range(1000)]\n"
        "    for block in blocks[:-1:step]: libc.free(block)\n"
        "make_holes(2)\n"
        "thread = threading.Thread(target=make_holes, args=(1,))\n"
        "thread.start()\n"
        "thread.join()\n"
        # Its arena is free when the thread has ended for the system, too.
        "while os.path.exists(f'/proc/self/task/{thread.native_id}'): time.sleep(0.001)\n"
        "assert libc.mallinfo2().fordblks > 7_000_000\n"
        "glibc_heap.fill_heap()\n"
        "before = libc.mallinfo2().fordblks\n"
        "assert before < 300_000, before\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_heap_that_maps_what_it_is_asked_for_can_be_filled() -> None:
    """The arena does not grow if the threshold is below the size that fills holes."""
    script = "from memfit.backends.cpu import glibc_heap; glibc_heap.fill_heap()"
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "4096"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=60)


def test_an_allocator_that_is_not_glibcs_is_left_alone() -> None:
    """glibc's figures do not show it and would never change."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.mallinfo2.restype = glibc_heap._HeapInfo

    class Preloaded:
        mallinfo2 = libc.mallinfo2

        @staticmethod
        def malloc(_num_bytes: int) -> int:
            return 0

    assert glibc_heap._serves_malloc(libc)
    assert not glibc_heap._serves_malloc(cast("ctypes.CDLL", Preloaded))


def test_a_filled_heap_grows_by_what_is_asked_for() -> None:
    """If another arena's heap is nearly full, glibc reserves 128 MiB for the next one."""
    script = (
        "import ctypes, os, sys, threading\n"
        "from memfit.backends.cpu import glibc_heap\n"
        "from memfit.backends.cpu.limits import status_bytes\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p\n"
        "def grow(num_blocks):\n"
        "    for _ in range(num_blocks): libc.malloc(50_000)\n"
        "def peak_of_growth():\n"
        "    grow(1200)\n"
        "    glibc_heap.fill_heap()\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        before = status_bytes()['VmPeak']\n"
        "        grow(300)\n"
        "        more = status_bytes()['VmPeak'] - before\n"
        "        os._exit(0 if more < 60 * 2**20 else 1)\n"
        "    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "codes = []\n"
        "thread = threading.Thread(target=peak_of_growth)\n"
        "thread.start()\n"
        "thread.join()\n"
        "sys.exit(codes[0])\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
