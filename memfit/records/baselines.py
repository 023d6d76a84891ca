"""How the peak of a step has grown since a figure that was kept."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from memfit.records.base import Record
from memfit.records.profiles import Role

__all__ = ["GrownShare", "Growth"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GrownShare(Record):
    """One module's memory of one role, then and now.

    Args:
        module: The module's path; a name in parentheses for memory that belongs to no module.
        role: The purpose of the memory.
        before_bytes: Its bytes at the peak that was kept; 0 if it had none.
        after_bytes: Its bytes at the peak now; 0 if it has none.
    """

    module: str
    role: Role
    before_bytes: int
    after_bytes: int

    _derived: ClassVar[tuple[str, ...]] = ("grown_bytes",)

    @property
    def grown_bytes(self) -> int:
        """How much more it is now; negative if it is less."""
        return self.after_bytes - self.before_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Growth(Record):
    """A peak now, beside the one that was kept.

    Args:
        name: The name under which the peak was kept.
        before_bytes: The peak that was kept.
        after_bytes: The peak now.
        before_used_bytes: What was in use at that peak: without the context and without free memory
            that the allocator kept.
        after_used_bytes: What is in use at the peak now.
        tolerance: The share by which either may grow.
        shares: What differs, the largest growth first.
        remark: Why the two may differ without a change of the code, such as another torch; empty if
            there is no such reason.
    """

    name: str
    before_bytes: int
    after_bytes: int
    before_used_bytes: int
    after_used_bytes: int
    tolerance: float
    shares: tuple[GrownShare, ...]
    remark: str = ""

    _derived: ClassVar[tuple[str, ...]] = ("has_grown",)

    @property
    def has_grown(self) -> bool:
        """Whether the peak, or what is in use at the peak, has grown by more than the tolerance.

        The allocator takes memory from the device in large segments. Free room in a segment can
        hide that a layer has grown, so what is in use counts for itself.
        """
        rise = 1 + self.tolerance
        return (
            self.after_bytes > self.before_bytes * rise
            or self.after_used_bytes > self.before_used_bytes * rise
        )
