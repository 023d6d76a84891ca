"""Decides from a script's source whether a value that it reads changes what it does.

A size that is read changes how much is allocated. A number or a truth value changes what the script
does if it is used in a condition or in the range of a loop. Three conditions do not count. Whether
a value is finite: real values are finite, as zeros are. An `assert`: if it fails, there are no
figures. An `if` that only raises, warns, prints, logs or saves.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from memfit.records import ReadKind

__all__ = ["Spot", "changes_course"]

_FINITE: Final = frozenset({"isfinite", "isnan", "isinf"})
# Parts of the names of functions that say or save something and do nothing else.
_SAYS: Final = re.compile(r"print|warn|log|debug|save|write|^info$|^error$")
_SMALL: Final = frozenset({"float", "format", "int", "item", "len", "str", "type"})
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
    scope = _scope(tree, spot)
    conditions = [
        (owner, node) for owner, node in _conditions(tree) if spot.is_in(node) or spot.begins(owner)
    ]
    if conditions:
        return not any(_asks_if_finite(node) for _, node in conditions) and any(
            not _only_says(owner, scope) for owner, _ in conditions
        )
    if kind is ReadKind.DECISION:
        return not any(
            isinstance(node, ast.Assert) or _asks_if_finite(node)
            for node in ast.walk(tree)
            if _is_at(node, spot)
        )
    return kind is ReadKind.NUMBER and _is_decided_by_name(scope, spot)


def _is_at(node: ast.AST, spot: Spot) -> bool:
    return isinstance(node, ast.stmt) and not hasattr(node, "body") and spot.is_in(node)


def _scope(tree: ast.Module, spot: Spot) -> _Function:
    """Return the innermost function with the spot."""
    functions = [node for node in ast.walk(tree) if isinstance(node, _Function)]
    inside = [node for node in functions if isinstance(node, ast.Module) or spot.is_in(node)]
    return max(inside, key=lambda node: getattr(node, "lineno", 0))


def _is_decided_by_name(scope: _Function, spot: Spot) -> bool:
    """Whether the value gets a name that a condition in the same function uses."""
    names = {
        target.id
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign) and spot.is_in(node)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return any(
        not _asks_if_finite(condition)
        and any(name.id in names for name in _names(condition, ast.Load))
        and not _only_says(owner, scope)
        for owner, condition in _conditions(scope)
    )


def _conditions(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.expr]]:
    """Yield each condition, with the statement or expression that it belongs to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.While | ast.IfExp):
            yield node, node.test
        elif isinstance(node, ast.For | ast.AsyncFor):
            yield node, node.iter
        elif isinstance(node, ast.comprehension):
            yield node.iter, node.iter
            for test in node.ifs:
                yield test, test


def _only_says(branch: ast.AST, scope: ast.AST) -> bool:
    """Whether a branch does nothing but say or save something, or end with an error.

    It may set names, if these are only used in its own condition and in what is said.
    """
    if not isinstance(branch, ast.If):
        return False
    statements = (*branch.body, *branch.orelse)
    kept = {name.id for part in statements for name in _names(part, ast.Store)}
    uses = {id(name) for part in (branch.test, *statements) for name in _names(part, ast.Load)}
    if kept:
        said = (part for part in ast.walk(scope) if isinstance(part, ast.Expr) and _says(part))
        uses |= {id(name) for part in said for name in _names(part, ast.Load)}
    return all(_says(part) for part in statements) and not any(
        name.id in kept and id(name) not in uses for name in _names(scope, ast.Load)
    )


def _names(tree: ast.AST, use: type[ast.Load | ast.Store]) -> Iterator[ast.Name]:
    return (
        part for part in ast.walk(tree) if isinstance(part, ast.Name) and isinstance(part.ctx, use)
    )


def _says(statement: ast.stmt) -> bool:
    match statement:
        case ast.Raise() | ast.Pass() | ast.Assert():
            return True
        case ast.Assign(targets=targets, value=value):
            return all(isinstance(target, ast.Name) for target in targets) and all(
                _name_of(part) in _SMALL for part in ast.walk(value) if isinstance(part, ast.Call)
            )
        case ast.If(body=body, orelse=others):
            return all(_says(part) for part in (*body, *others))
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.Expr(value=ast.Call() as call):
            return _SAYS.search(_name_of(call)) is not None
    return False


def _name_of(call: ast.Call) -> str:
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


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
