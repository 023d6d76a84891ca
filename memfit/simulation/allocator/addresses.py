"""Where the driver places memory: the addresses of segments.

The caching allocator takes the smallest free block that is large enough. Of blocks of the same size
it takes, up to torch 2.11, the one at the lowest address. So there the driver's addresses decide
how the memory breaks into pieces, and with it how much is reserved. Later releases go by age
(`BlockOrder`).

The driver keeps regions. The first one has 512 MiB, and it is there from the start. Parts of it are
the driver's own: most of them until the first kernel runs. A request takes the smallest hole that
is large enough in the newest region that has one. If there is none, the driver makes a new region
below the others, of a multiple of 32 MiB. A region that is empty again is given up, except the
first.

Source: the histories of nine programs on an H100 80GB (driver 580.159.04, torch 2.11.0+cu130,
    2026-11-27). Two of them are in tests/data. Replayed with this rule, the reserved bytes are the
    real ones after every request of eight histories; in one they are 2 MiB less for a while. Other
    cards and drivers were not measured. memfit/rehearsal/device/addresses.c does the same.
"""

from __future__ import annotations

from bisect import insort
from typing import Final

from memfit.units import MIB

__all__ = ["HANDLE_BYTES", "Addresses"]

HANDLE_BYTES: Final = 64 * MIB
"""What a cuBLAS handle takes in these addresses, beside its workspace."""

_STEP_BYTES: Final = 32 * MIB
_FIRST_REGION_BYTES: Final = 512 * MIB
_BASE: Final = 1 << 47  # of the first region
_UNTIL_KERNELS_BYTES: Final = 414 * MIB  # taken at the base until the first kernel runs
_HOLES_AT_FIRST: Final = ((_BASE + 414 * MIB, 2 * MIB), (_BASE + 488 * MIB, 24 * MIB))
# Programs have other things between the first region and the later ones. They never touch.
_GAP_BYTES: Final = 256 * MIB


class _Region:
    """A range of addresses with its holes, in the order of addresses."""

    __slots__ = ("end", "holes", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.holes = [(start, end - start)]

    def take(self, num_bytes: int) -> int | None:
        """Take the smallest hole that is large enough, or the start of it."""
        best: tuple[int, int] | None = None
        for hole in self.holes:
            if hole[1] >= num_bytes and (best is None or hole[1] < best[1]):
                best = hole
        if best is None:
            return None
        start, size = best
        at = self.holes.index(best)
        self.holes[at : at + 1] = (
            [(start + num_bytes, size - num_bytes)] if size > num_bytes else []
        )
        return start

    def give_back(self, address: int, num_bytes: int) -> None:
        """Make a hole, and join it to the holes beside it."""
        insort(self.holes, (address, num_bytes))
        joined: list[tuple[int, int]] = []
        for start, size in self.holes:
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((start, size))
        self.holes = joined


class Addresses:
    """The addresses of a device's memory, placed as the driver places them."""

    __slots__ = ("_has_run_kernels", "_regions")

    def __init__(self) -> None:
        first = _Region(_BASE, _BASE + _FIRST_REGION_BYTES)
        first.holes = list(_HOLES_AT_FIRST)
        self._regions = [first]  # the newest last
        self._has_run_kernels = False

    def place(self, num_bytes: int) -> int:
        """Return where the driver places so many bytes, and take them."""
        for region in reversed(self._regions):
            address = region.take(num_bytes)
            if address is not None:
                return address
        size = -(-num_bytes // _STEP_BYTES) * _STEP_BYTES
        end = _BASE - _GAP_BYTES
        for region in sorted(self._regions[1:], key=lambda one: one.start, reverse=True):
            if end - region.end >= size:
                break
            end = region.start
        new = _Region(end - size, end)
        self._regions.append(new)
        address = new.take(num_bytes)
        assert address is not None
        return address

    def vacate(self, address: int, num_bytes: int) -> None:
        """Give addresses back."""
        for at, region in enumerate(self._regions):
            if region.start <= address < region.end:
                region.give_back(address, num_bytes)
                if at and region.holes[0] == (region.start, region.end - region.start):
                    del self._regions[at]
                return

    def run_kernels(self) -> bool:
        """Take note that a kernel runs. At the first, the driver gives up most of its own part.

        Returns:
            Whether it was the first.
        """
        is_first = not self._has_run_kernels
        if is_first:
            self._has_run_kernels = True
            self._regions[0].give_back(_BASE, _UNTIL_KERNELS_BYTES)
        return is_first
