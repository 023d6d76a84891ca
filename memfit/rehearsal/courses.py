"""Whether a script goes another way by what it reads: told from its source.

A size that is read decides how much is allocated. A number or a truth value decides where it stands
in a condition, or in what a loop runs over. Whether a value is finite is no such question: with
real values it is, as with zeros.
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
        line: The line, from 1.
        end_line: The last line.
        column: Where in the line, in bytes; `None` where only the line is known.
        end_column: Where in the last line it ends.
    """

    path: str
    line: int
    end_line: int
    column: int | None = None
    end_column: int | None = None

    def is_in(self, node: ast.AST) -> bool:
        """Whether a part of the syntax contains it, or begins on its line."""
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
        """Whether a statement begins here: Python tests a condition where its `if` stands."""
        return (
            isinstance(node, ast.stmt)
            and node.lineno == self.line
            and self.column in (None, node.col_offset)
        )


def changes_course(kind: ReadKind, spot: Spot | None) -> bool:
    """Say whether a script goes another way by what it reads.

    Args:
        kind: What is read.
        spot: Where; `None` where there is no source.
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
    """Whether what is read gets a name that a condition of the same function mentions."""
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
    """Yield what a script goes by, each with the statement or expression that goes by it."""
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
