"""Decides from a script's source whether a value that it reads changes what it does.

A size that is read changes how much is allocated. A number or a truth value changes what the script
does if it is used in a condition or in the range of a loop. The question whether a value is finite
does not count, because real values are finite, as zeros are.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from memfit.records import ReadKind

__all__ = ["Spot", "changes_course"]

_FINITE: Final = frozenset({"isfinite", "isnan", "isinf"})
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Module


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """A place in a file.

    Args:
        path: The file.
        line: The first line, from 1.
        end_line: The last line.
        column: The position in the first line, in bytes; `None` if only the line is known.
        end_column: The position of its end in the last line.
    """

    path: str
    line: int
    end_line: int
    column: int | None = None
    end_column: int | None = None

    def is_in(self, node: ast.AST) -> bool:
        """Whether a node of the syntax tree contains the spot, or begins on its line."""
        assert isinstance(node, ast.expr | ast.stmt)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        if self.column is None or self.end_column is None:
            return node.lineno <= self.line <= node.end_lineno
        begin, end = (self.line, self.column), (self.end_line, self.end_column)
        return (node.lineno, node.col_offset) <= begin and end <= (
            node.end_lineno,
            node.end_col_offset,
        )

    def begins(self, node: ast.AST) -> bool:
        """Whether a statement begins here. Python reports a condition at the line of its `if`."""
        return (
            isinstance(node, ast.stmt)
            and node.lineno == self.line
            and self.column in (None, node.col_offset)
        )


def changes_course(kind: ReadKind, spot: Spot | None) -> bool:
    """Return whether a value that a script reads changes what the script does.

    Args:
        kind: The kind of value that is read.
        spot: The place of the read; `None` if there is no source.
    """
    if kind is ReadKind.SIZE:
        return True
    tree = None if spot is None else _tree(spot.path)
    if spot is None or tree is None:
        return kind is ReadKind.DECISION
    conditions = [
        node for owner, node in _conditions(tree) if spot.is_in(node) or spot.begins(owner)
    ]
    if conditions:
        return not any(_asks_if_finite(node) for node in conditions)
    if kind is ReadKind.DECISION:
        return not any(_asks_if_finite(node) for node in ast.walk(tree) if _is_at(node, spot))
    return kind is ReadKind.NUMBER and _is_decided_by_name(tree, spot)


def _is_at(node: ast.AST, spot: Spot) -> bool:
    return isinstance(node, ast.stmt) and not hasattr(node, "body") and spot.is_in(node)


def _is_decided_by_name(tree: ast.Module, spot: Spot) -> bool:
    """Whether the value gets a name that a condition in the same function uses."""
    functions = [node for node in ast.walk(tree) if isinstance(node, _Function)]
    inside = [node for node in functions if isinstance(node, ast.Module) or spot.is_in(node)]
    innermost = max(inside, key=lambda node: getattr(node, "lineno", 0))
    names = {
        target.id
        for node in ast.walk(innermost)
        if isinstance(node, ast.Assign) and spot.is_in(node)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return any(
        not _asks_if_finite(condition)
        and any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(condition))
        for _, condition in _conditions(innermost)
    )


def _conditions(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.expr]]:
    """Yield each condition, with the statement or expression that it belongs to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert):
            yield node, node.test
        elif isinstance(node, ast.For | ast.AsyncFor):
            yield node, node.iter
        elif isinstance(node, ast.comprehension):
            yield node.iter, node.iter
            for test in node.ifs:
                yield test, test


def _asks_if_finite(tree: ast.AST) -> bool:
    return any(
        (isinstance(node, ast.Attribute) and node.attr in _FINITE)
        or (isinstance(node, ast.Name) and node.id in _FINITE)
        for node in ast.walk(tree)
    )


@functools.lru_cache(maxsize=64)
def _tree(path: str) -> ast.Module | None:
    try:
        return ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None
