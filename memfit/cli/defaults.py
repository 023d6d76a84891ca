"""Defaults of options from the `[tool.memfit]` table of a pyproject.toml.

A key is an option's name without its dashes. Values under `[tool.memfit.plan]` are for that command
only. They override values for all commands.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from memfit.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["defaults_of", "find_table"]


def find_table(folder: Path) -> tuple[Path, Mapping[str, Any]] | None:
    """Return the nearest pyproject.toml with a `[tool.memfit]` table, and the table.

    Args:
        folder: The first folder to search; its parents follow.

    Raises:
        UsageError: A pyproject.toml cannot be read.
    """
    for each in (folder, *folder.parents):
        path = each / "pyproject.toml"
        if not path.is_file():
            continue
        try:
            read = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"{path} cannot be read: {error}.") from error
        table = read.get("tool", {}).get("memfit")
        return (path, table) if isinstance(table, dict) else None
    return None


def defaults_of(
    path: Path, table: Mapping[str, Any], commands: Mapping[str, click.Command]
) -> dict[str, dict[str, Any]]:
    """Return the defaults of each command's parameters, in the form that click needs.

    Args:
        path: The file, for error messages.
        table: Its `[tool.memfit]` table.
        commands: The commands by name.

    Raises:
        UsageError: A key is not an option of any command, or not of its own command.
    """
    shared = {key: value for key, value in table.items() if key not in commands}
    known: set[str] = set()
    defaults: dict[str, dict[str, Any]] = {}
    for name, command in commands.items():
        parameters = _parameters(command)
        known |= parameters.keys()
        own = table.get(name, {})
        if not isinstance(own, dict):
            raise UsageError(
                f"{path}: [tool.memfit] {name} is the name of a command, so it must be a table."
            )
        for key in own:
            _check(path, key, parameters.keys(), f"tool.memfit.{name}")
        values = {**{key: shared[key] for key in shared if key in parameters}, **own}
        defaults[name] = {parameters[key]: _value(value) for key, value in values.items()}
    for key in shared:
        _check(path, key, known, "tool.memfit")
    return defaults


def _parameters(command: click.Command) -> dict[str, str]:
    """Return the names of a command's parameters, by the long names of their options."""
    return {
        text.removeprefix("--"): parameter.name
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.name is not None
        for text in parameter.opts
        if text.startswith("--")
    }


def _check(path: Path, key: str, known: set[str] | Any, table: str) -> None:
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UsageError(f"{path}: [{table}] has no option {key!r}{hint}")


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return [f"{key}={inner!r}" for key, inner in value.items()]
    return value
