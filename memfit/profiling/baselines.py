"""Peaks that are kept in a file of a repository, and how a new peak differs from one of them.

The file is JSON, sorted, and has a line for each module and role, so that a change of it can be
read in a review.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from memfit.errors import UsageError
from memfit.records import GrownShare, Growth, Peak, Role, Source
from memfit.units import format_bytes

__all__ = ["Baselines", "growth_words"]

_SCHEMA_VERSION = 1
_NUM_SHARES = 10


class Baselines:
    """A file of peaks by name.

    Args:
        path: The file. It need not exist yet.

    Raises:
        UsageError: The file cannot be read, or is no such file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            version, peaks = read["schema_version"], dict(read["peaks"])
            if version == _SCHEMA_VERSION:
                self._kept = {name: _checked(entry) for name, entry in peaks.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path} is no baseline of memfit's: give another file, or delete it and run again "
                "to write one."
            ) from error
        if version != _SCHEMA_VERSION:
            raise UsageError(
                f"{path} has schema version {version}, and this memfit knows {_SCHEMA_VERSION}: "
                "delete it and run again to write one."
            )

    def __contains__(self, name: object) -> bool:
        """Whether a peak is kept under a name."""
        return name in self._kept

    def others_words(self, name: str) -> str:
        """Say which peaks are kept besides one, for a user who may have meant another.

        Args:
            name: The name of the step that was asked for.

        Returns:
            The end of a sentence; empty if no others are kept.
        """
        others = [each for each in self._kept if each != name]
        if not others:
            return ""
        (near,) = difflib.get_close_matches(name, others, n=1, cutoff=0)
        count = f"{len(others)} other{'s' if len(others) > 1 else ''}"
        return f", beside {count} (the nearest is of {near})"

    def keep(self, name: str, peak: Peak, *, source: Source, torch_version: str) -> None:
        """Keep a peak, and write the file.

        Args:
            name: The name of the step.
            peak: Its peak.
            source: Where the peak comes from.
            torch_version: The torch that ran.

        Raises:
            UsageError: The file cannot be written.
        """
        self._kept[name] = {
            "total_bytes": peak.total_bytes,
            "source": source.value,
            "torch_version": torch_version,
            "shares": _shares_of(peak),
        }
        written = {"schema_version": _SCHEMA_VERSION, "peaks": dict(sorted(self._kept.items()))}
        try:
            self._path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{self._path} cannot be written: {error.strerror}.") from error

    def compare(
        self, name: str, peak: Peak, *, source: Source, torch_version: str, tolerance: float
    ) -> Growth:
        """Compare a peak with the one that is kept under the same name.

        Args:
            name: The name of the step; it is kept.
            peak: Its peak now.
            source: Where the peak comes from.
            torch_version: The torch that ran.
            tolerance: The share by which it may grow.
        """
        kept = self._kept[name]
        after = _shares_of(peak)
        before: dict[str, int] = kept["shares"]
        shares = []
        for key in before.keys() | after.keys():
            module, _, role = key.rpartition(" ")
            share = GrownShare(
                module=module,
                role=Role(role),
                before_bytes=before.get(key, 0),
                after_bytes=after.get(key, 0),
            )
            if share.grown_bytes:
                shares.append(share)
        return Growth(
            name=name,
            before_bytes=kept["total_bytes"],
            after_bytes=peak.total_bytes,
            before_used_bytes=_used(before),
            after_used_bytes=_used(after),
            tolerance=tolerance,
            shares=tuple(sorted(shares, key=lambda share: (-share.grown_bytes, share.module))),
            remark=_remark(kept, source, torch_version),
        )


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a kept peak, if it has all that `compare` reads.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It has not.
    """
    sizes = [entry["total_bytes"], *entry["shares"].values()]
    if not all(isinstance(size, int) for size in sizes):
        raise TypeError("a size is not a number of bytes")
    for key in entry["shares"]:
        Role(key.rpartition(" ")[2])
    Source(entry["source"])
    return {**entry, "torch_version": str(entry["torch_version"])}


def _shares_of(peak: Peak) -> dict[str, int]:
    """Return the bytes of each module and role, sorted, in the form in which they are kept."""
    return {
        f"{share.module} {share.role.value}": share.num_bytes
        for share in sorted(peak.modules, key=lambda share: (share.module, share.role))
    }


def _used(shares: dict[str, int]) -> int:
    """Return the bytes of all roles that a change of the model or the step can change."""
    unused = (Role.CONTEXT.value, Role.FRAGMENTATION.value)
    return sum(size for key, size in shares.items() if key.rpartition(" ")[2] not in unused)


def _remark(kept: dict[str, Any], source: Source, torch_version: str) -> str:
    said = []
    if kept["torch_version"] != torch_version:
        said.append(f"it was kept with torch {kept['torch_version']}, and this is {torch_version}")
    if kept["source"] != source.value:
        said.append(f"it was {kept['source']}, and this one is {source.value}")
    return "; ".join(said)


def growth_words(growth: Growth) -> str:
    """Return what has grown, in lines: the peak, and then the modules with the largest growth.

    Args:
        growth: The growth.
    """
    changed = growth.after_bytes - growth.before_bytes
    sign = "+" if changed >= 0 else ""
    first = (
        f"The peak of {growth.name} is {format_bytes(growth.after_bytes)}; kept: "
        f"{format_bytes(growth.before_bytes)} ({sign}{format_bytes(changed)}, "
        f"{growth.tolerance:.0%} is allowed); in use at the peak: "
        f"{format_bytes(growth.after_used_bytes)}, kept: {format_bytes(growth.before_used_bytes)}."
    )
    remark = [f"Note: {growth.remark}."] if growth.remark else []
    grown = [share for share in growth.shares if share.grown_bytes > 0]
    lines = [
        f"  +{format_bytes(share.grown_bytes)}  {share.module}, "
        f"{share.role.value.replace('_', ' ')}: {format_bytes(share.before_bytes)} -> "
        f"{format_bytes(share.after_bytes)}"
        for share in grown[:_NUM_SHARES]
    ]
    more = [f"  and {len(grown) - _NUM_SHARES} more"] if len(grown) > _NUM_SHARES else []
    return "\n".join([first, *remark, *lines, *more])
