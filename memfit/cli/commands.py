"""What every command has: flags that can be switched off, and a word on a project's defaults."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import click

from memfit.errors import MemfitError, UsageError

__all__ = ["FROM_PROJECT", "Command", "Switch", "excluded", "is_typed"]

FROM_PROJECT = "memfit.from_project"
"""The key in a context's `meta` under which a project's file and its defaults are kept."""

_OFF = {"--no-grad": "--grad"}
_PRINTED = ("--json", "--csv")


class Switch(click.Option):
    """An option that is on or off. `--no-NAME` overrides what a project's file switches on.

    The help shows only the name, because off is where every one of them begins.
    """

    def __init__(self, param_decls: Sequence[str], **attributes: Any) -> None:
        """Make the option from its names, the one with two dashes first."""
        name, *others = param_decls
        super().__init__([f"{name}/{_off(name)}", *others], is_flag=True, **attributes)

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the line of the help."""
        secondary, self.secondary_opts = self.secondary_opts, []
        try:
            return super().get_help_record(ctx)
        finally:
            self.secondary_opts = secondary


def _off(name: str) -> str:
    return _OFF.get(name, f"--no-{name.removeprefix('--')}")


class Command(click.Command):
    """A command that says which of a project's defaults it uses."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read what was typed. An error may be about a default, so the defaults are said first."""
        _refuse_files(args)
        try:
            return super().parse_args(ctx, args)
        except (MemfitError, click.UsageError):
            self._announce(ctx)
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        self._announce(ctx)
        return super().invoke(ctx)

    def _announce(self, ctx: click.Context) -> None:
        path, defaults = ctx.meta.get(FROM_PROJECT, (None, {}))
        used = [
            _shown(parameter, defaults[key])
            for parameter in self.params
            for key in defaults
            if f"--{key}" in parameter.opts and _counts(ctx, parameter.name or "")
        ]
        if used:
            click.echo(f"Defaults from {path}: {', '.join(used)}.", err=True)


def _refuse_files(args: Sequence[str]) -> None:
    """Refuse a file's name after an option that prints to the terminal.

    Raises:
        UsageError: There is one. It would be taken for a model.
    """
    for option, word in itertools.pairwise(itertools.takewhile(lambda word: word != "--", args)):
        if option in _PRINTED and word.endswith((".json", ".csv")):
            raise UsageError(
                f"{option} prints to the terminal and takes no file: end the command with > {word}"
            )


def _counts(context: click.Context, name: str) -> bool:
    """Whether a project's default is used: nothing that was typed overrides or excludes it."""
    source = context.get_parameter_source(name)
    # Without a source, an error came before the parameter's turn.
    if source not in {click.core.ParameterSource.DEFAULT_MAP, None}:
        return False
    return name not in excluded(context)


def excluded(context: click.Context) -> frozenset[str]:
    """Return the parameters whose defaults are left out because of what was typed.

    A device of this machine and a card that is not here exclude each other, and `--train-args` has
    the batch and the options of the step.

    Args:
        context: The command that runs.
    """
    typed = {name for name in ("device", "gpus") if is_typed(context, name)}
    others = {"device": "gpus", "gpus": "device"}
    left_out = {others[name] for name in typed if len(typed) == 1}
    text = context.params.get("train_args")
    if text is not None:
        from memfit.integrations.train_args import read_train_arguments

        left_out |= {"effective_batch_size", *dict(read_train_arguments(text).keywords)}
    return frozenset(left_out)


def is_typed(context: click.Context, name: str) -> bool:
    """Whether the user typed an option. A project's defaults set options too."""
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _shown(parameter: click.Parameter, value: object) -> str:
    """Return a default in words, with what switches it off."""
    name = parameter.opts[0].removeprefix("--")
    if isinstance(parameter, Switch) and value is True:
        return f"{name} (off with {parameter.secondary_opts[0]})"
    return f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
