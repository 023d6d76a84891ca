"""Defaults of options from the `[tool.memfit]` table of a pyproject.toml.

A key is an option's name without its dashes. Values under `[tool.memfit.plan]` are for that command
only. They override values for all commands.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from memfit.cli.options import JustGiven
from memfit.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["defaults_of", "find_table", "parameters_of"]


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
        tools = read.get("tool", {})
        if not isinstance(tools, dict) or "memfit" not in tools:
            return None
        if not isinstance(tools["memfit"], dict):
            raise UsageError(f"{path}: tool.memfit must be a table, not {tools['memfit']!r}.")
        return path, tools["memfit"]
    return None


def defaults_of(
    path: Path, table: Mapping[str, Any], commands: Mapping[str, click.Command], name: str
) -> dict[str, Any]:
    """Return the defaults of a command's options, by their names without dashes.

    Args:
        path: The file, for error messages.
        table: Its `[tool.memfit]` table.
        commands: The commands by name.
        name: The name of the command that runs.

    Raises:
        UsageError: A key is not an option of any command, or not of its own command, or a value is
            of another kind than the option's.
    """
    shared = {key: value for key, value in table.items() if key not in commands}
    known = set(commands)
    for each, command in commands.items():
        parameters = _parameters(command)
        known |= parameters.keys()
        own = table.get(each, {})
        if not isinstance(own, dict):
            raise UsageError(
                f"{path}: [tool.memfit] {each} is the name of a command, so it must be a table."
            )
        for key in own:
            _check(path, key, parameters.keys(), f"tool.memfit.{each}")
    for key in shared:
        _check(path, key, known, "tool.memfit")
    if name not in commands:
        return {}
    parameters = _parameters(commands[name])
    values = {**{key: shared[key] for key in shared if key in parameters}, **table.get(name, {})}
    return {key: _value(path, parameters[key], key, value) for key, value in values.items()}


def parameters_of(defaults: Mapping[str, Any], command: click.Command) -> dict[str, Any]:
    """Return defaults by the names of parameters, in the form that click needs.

    Args:
        defaults: The defaults by the names of options, as `defaults_of` returns them.
        command: The command that runs.
    """
    parameters = _parameters(command)
    return {parameters[key].name or key: value for key, value in defaults.items()}


def _parameters(command: click.Command) -> dict[str, click.Option]:
    """Return a command's parameters, by the long names of their options."""
    return {
        text.removeprefix("--"): parameter
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.name is not None
        for text in parameter.opts
        if text.startswith("--")
    }


def _check(path: Path, key: str, known: Iterable[str], table: str) -> None:
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UsageError(f"{path}: [{table}] has no option {key!r}{hint}")


def _value(path: Path, option: click.Option, key: str, value: Any) -> Any:
    """Return a value in the form that click needs.

    click itself would take a text as a list of letters, and 2.5 as the whole number 2.
    """
    if isinstance(value, dict):
        value = [f"{inner}={each!r}" for inner, each in value.items()]
    if option.multiple:
        values = value if isinstance(value, list) else [value]
        return [_single(path, option, key, each) for each in values]
    return _single(path, option, key, value)


def _single(path: Path, option: click.Option, key: str, value: Any) -> Any:
    if option.is_flag and not isinstance(value, bool):
        wanted = "true or false"
    elif isinstance(value, (list, dict)):
        wanted = "one value"
    elif isinstance(option.type, click.types.IntParamType) and not isinstance(value, (int, str)):
        wanted = "a whole number"
    elif isinstance(value, bool) and not option.is_flag and not isinstance(option.type, JustGiven):
        wanted = "a value"
    else:
        return value if isinstance(value, (str, int, float, bool)) else str(value)
    raise UsageError(f"{path}: {key} takes {wanted}, not {value!r}.")
