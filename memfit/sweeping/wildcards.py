"""The wildcard that a user meant, if theirs matches no name: the least letters are changed."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

__all__ = ["nearest_pattern"]

_SIGN = re.compile(r"\*|\?|\[[^\]]*\]|.")
# One letter of this many may be wrong. With more, names come up that are not like the pattern.
_LETTERS_PER_MISTAKE = 4
# A letter that was left out is the usual mistake, so at the same distance it comes first.
_MISTAKE = 100
_ANOTHER_LETTER = 101
_LETTER_TOO_MANY = 102


def nearest_pattern(pattern: str, names: Sequence[str]) -> str | None:
    """Return the pattern with the fewest letters changed that matches one of the names.

    Args:
        pattern: A pattern with the wildcards of a shell, which matches none of the names.
        names: The names.

    Returns:
        The pattern, in small letters; `None` if none is near. Of several, the one that matches the
        most names.
    """
    signs = _SIGN.findall(pattern.lower())
    num_letters = sum(not _is_wildcard(sign) for sign in signs)
    mistakes = max(1, num_letters // _LETTERS_PER_MISTAKE)
    ways = [_mended(signs, name, mistakes * _LETTER_TOO_MANY) for name in names]
    least = min((way[0] for way in ways if way is not None), default=None)
    near = dict.fromkeys(way[1] for way in ways if way is not None and way[0] == least)
    # The letters in brackets were not compared, so a pattern may still match nothing.
    num_matched = {each: len(fnmatch.filter(names, each)) for each in near}
    best = max(near, key=num_matched.__getitem__, default=None)
    return best if best is not None and num_matched[best] else None


def _is_wildcard(sign: str) -> bool:
    return len(sign) > 1 or sign in "*?"


def _mended(signs: Sequence[str], name: str, allowed: int) -> tuple[int, str] | None:
    """Return what the mistakes of a pattern cost, and the pattern without them, for a name.

    A letter may be missing, too many, another one, or changed places with the next.

    Source: the optimal string alignment distance, with a wildcard that takes letters for nothing.

    Args:
        signs: The pattern's letters and wildcards.
        name: The name that the mended pattern matches.
        allowed: The most that the mistakes may cost; if they cost more, the result is `None`.
    """
    # rows[i][j] is how the first i signs become a pattern for the first j letters.
    rows = [[(_MISTAKE * j, name[:j]) for j in range(len(name) + 1)]]
    for i, sign in enumerate(signs, start=1):
        above = rows[-1]
        if sign == "*":
            row = [(above[0][0], above[0][1] + sign)]
            for cost, written in above[1:]:
                row.append(min((cost, written + sign), row[-1], key=_cost))
            rows.append(row)
            continue
        row = [(above[0][0] + _LETTER_TOO_MANY, above[0][1])]
        for j, letter in enumerate(name, start=1):
            is_wildcard = _is_wildcard(sign)
            is_same = is_wildcard or sign == letter
            cost, written = above[j - 1]
            ways = [
                (
                    cost if is_same else cost + _ANOTHER_LETTER,
                    written + (sign if is_same else letter),
                ),
                (above[j][0] + _LETTER_TOO_MANY, above[j][1]),
                (row[-1][0] + _MISTAKE, row[-1][1] + letter),
            ]
            if i > 1 and j > 1 and (sign, signs[i - 2]) == (name[j - 2], letter):
                cost, written = rows[i - 2][j - 2]
                ways.append((cost + _MISTAKE, written + name[j - 2 : j]))
            row.append(min(ways, key=_cost))
        if min(map(_cost, row)) > allowed:
            return None
        rows.append(row)
    found = rows[-1][-1]
    return found if found[0] <= allowed else None


def _cost(way: tuple[int, str]) -> int:
    return way[0]
