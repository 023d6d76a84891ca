"""Sets up glibc's heap so that a step needs the same memory in every run.

Without glibc (musl, macOS) these functions do nothing, and memory may differ from run to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading

from memfit.units import KIB, MIB

__all__ = ["MMAP_THRESHOLD_BYTES", "block_bytes", "fill_heap", "is_heap_tuned", "steady_heap"]

# glibc's own threshold at start. By default, glibc raises it to the size of the largest freed
# block, up to 32 MiB. Smaller blocks then come from a heap that fragments differently in every run,
# and the same step needs a few percent more or less each time (mallopt(3); benchmarks/heap.py).
MMAP_THRESHOLD_BYTES = 128 * KIB

_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_M_ARENA_MAX = -8  # glibc's malloc.h
# From glibc's malloc.c: MINSIZE, and the limits of the blocks that a thread keeps for itself.
_LEAST_BLOCK_BYTES = 32
_TCACHE_BLOCKS = 7
_TCACHE_BYTES = 1032
_BLOCKS_AT_ONCE = 16
_HEAP_BYTES = 64 * MIB
_NON_MAIN_ARENA = 4  # glibc's malloc.c
_PAGE_BYTES = 4 * KIB
_ALIGNMENT_BYTES = 64


class _HeapInfo(ctypes.Structure):
    """glibc's statistics of its heap, in bytes and counts (mallinfo(3))."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def steady_heap() -> None:
    """Make the memory of this process repeatable from now on, as far as glibc allows it."""
    with contextlib.suppress(AttributeError):
        # One arena, because the thread pool would map other arenas in the middle of a trial.
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
        if not is_heap_tuned():
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)


def fill_heap() -> None:
    """Take every free block of the heap for good, so that later allocations find no holes.

    A fork inherits the holes in its parent's heap. They can be a megabyte, or as large as the
    parent's highest peak. A step that fits into the holes would need less memory in one search than
    in the next. All arenas are filled, because a thread whose arena is full is served by another
    one.

    Source: glibc's malloc/arena.c (arena_get_retry, and the free list that a fork puts all arenas
        on but its own).
    """
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        libc.malloc.restype = ctypes.c_void_p
        libc.mallinfo2.restype = _HeapInfo
        if not _serves_malloc(libc):
            return
        # A new thread that requests memory gets an arena that no other thread uses.
        num_arenas = _num_arenas(libc)
        all_attached = threading.Barrier(num_arenas)
        one_at_a_time = threading.Lock()

        def fill() -> None:
            libc.malloc(1)
            all_attached.wait()
            with one_at_a_time:
                _fill_arena(libc)

        threads = [threading.Thread(target=fill) for _ in range(num_arenas - 1)]
        for thread in threads:
            thread.start()
        fill()
        for thread in threads:
            thread.join()


def _serves_malloc(libc: ctypes.CDLL) -> bool:
    """Whether glibc serves malloc here, and not an allocator that was preloaded."""
    before = libc.mallinfo2()
    libc.malloc(MMAP_THRESHOLD_BYTES // 2)
    after = libc.mallinfo2()
    return bool((after.uordblks, after.hblks) != (before.uordblks, before.hblks))


def _num_arenas(libc: ctypes.CDLL) -> int:
    text, num_bytes = ctypes.c_void_p(), ctypes.c_size_t()
    libc.open_memstream.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(num_bytes)))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    num_arenas = ctypes.string_at(text, num_bytes.value).count(b"<heap nr=")
    libc.free(text)
    return num_arenas


def _fill_arena(libc: ctypes.CDLL) -> None:
    """Fill the arena of this thread. In a secondary arena, fill its heap to the end.

    Otherwise the arena would need a new heap in the middle of a trial. For a moment glibc reserves
    twice 64 MiB for it, without using them. They would be counted in the peak of that trial.

    Source: glibc's malloc/arena.c (HEAP_MAX_SIZE, new_heap).
    """
    for num_bytes in range(_LEAST_BLOCK_BYTES - 8, _TCACHE_BYTES + 1, 16):
        for _ in range(_TCACHE_BLOCKS):
            libc.malloc(num_bytes)
    num_bytes = MMAP_THRESHOLD_BYTES // 2
    _fill_holes(libc, num_bytes)
    block = libc.malloc(num_bytes)
    heap = block // _HEAP_BYTES
    while _is_secondary(block) and block // _HEAP_BYTES == heap:
        block = libc.malloc(num_bytes)
    while num_bytes >= _LEAST_BLOCK_BYTES:
        _fill_holes(libc, num_bytes)
        num_bytes //= 2


def _fill_holes(libc: ctypes.CDLL, num_bytes: int) -> None:
    """Allocate blocks of one size until the heap has to grow."""
    # If the user has set a lower threshold, blocks are mapped and the heap does not grow.
    before = libc.mallinfo2()
    after = before
    while (after.arena, after.hblks) == (before.arena, before.hblks):
        # Several blocks at once, because `mallinfo2` walks through all free blocks.
        for _ in range(_BLOCKS_AT_ONCE):
            libc.malloc(num_bytes)
        after = libc.mallinfo2()


def _is_secondary(block: int) -> bool:
    """Whether a block belongs to another arena than the main one."""
    word = ctypes.sizeof(ctypes.c_size_t)
    return bool(ctypes.c_size_t.from_address(block - word).value & _NON_MAIN_ARENA)


def block_bytes(num_bytes: int) -> int:
    """Return the bytes that glibc takes for a block. From its threshold on, these are whole pages.

    Args:
        num_bytes: Bytes that were requested.

    Source: glibc's malloc.c (sysmalloc_mmap). torch aligns tensors to 64 bytes.
    """
    if num_bytes < MMAP_THRESHOLD_BYTES:
        return num_bytes
    return -(-(num_bytes + _ALIGNMENT_BYTES) // _PAGE_BYTES) * _PAGE_BYTES


def is_heap_tuned() -> bool:
    """Whether the user has chosen glibc's mmap threshold, or another allocator."""
    return (
        "MALLOC_MMAP_THRESHOLD_" in os.environ
        or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
        or "malloc" in os.environ.get("LD_PRELOAD", "")
    )
