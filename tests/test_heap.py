"""glibc's heap, and what trials ask of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memfit import heap
from memfit.backends.cpu import CpuBackend
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
    """Then nothing needs setting for training either."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert heap.is_heap_tuned() is is_tuned
    assert bool(CpuBackend(memory_bytes=200 * MIB).environment) is not is_tuned


@pytest.mark.parametrize(
    ("mode", "variables", "helps"),
    [
        ("always [madvise] never", {}, True),
        ("[always] madvise never", {}, False),
        ("always madvise [never]", {}, False),
        (None, {}, False),
        ("always [madvise] never", {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}, False),
        ("always [madvise] never", {"LD_PRELOAD": "libjemalloc.so.2"}, False),
    ],
)
def test_huge_pages_are_asked_for_where_that_changes_something(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    mode: str | None,
    variables: dict[str, str],
    helps: bool,
) -> None:
    """The kernel has to leave the choice to programs, and the user to us."""
    if mode is not None:
        (tmp_path / "enabled").write_text(mode)
    monkeypatch.setattr(heap, "_HUGE_PAGES_MODE", tmp_path / "enabled")
    monkeypatch.setattr(os, "confstr", lambda _: "glibc 2.36")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert heap.huge_pages_help() is helps


def test_the_program_starts_itself_again_and_says_so() -> None:
    """With huge pages where they help; the library's own process is left as it is."""
    command = [sys.executable, "-m", "memfit", "probe", "test_vit", "--device", "cpu", "--json"]
    options = ["--image-size", "32", "--memory", "200MiB", "--max-batch-size", "2"]
    done = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    (result,) = json.loads(done.stdout)["results"]
    asked = "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in result["environment"]
    assert asked is heap.huge_pages_help()
    assert heap.STARTED_AGAIN not in os.environ


def test_a_filled_heap_has_no_holes() -> None:
    """What is asked for next comes from new memory, whatever was freed before."""
    script = (
        "import ctypes\n"
        "from memfit import heap\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p\n"
        "libc.mallinfo2.restype = heap._HeapInfo\n"
        "libc.free.argtypes = [ctypes.c_void_p]\n"
        "blocks = [libc.malloc(5000) for _ in range(1000)]\n"
        "for block in blocks[::2]: libc.free(block)\n"
        "heap.fill_heap()\n"
        "before = libc.mallinfo2().fordblks\n"
        "assert before < 300_000, before\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
