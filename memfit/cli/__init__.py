"""The command line: the only place that prints, prompts and exits.

Each command has its own file and imports torch only when it runs. For every command, errors become
one sentence and an exit code here.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from memfit import __version__
from memfit.cli.commands import FROM_PROJECT
from memfit.cli.defaults import defaults_of, find_table, parameters_of
from memfit.cli.missing import explained
from memfit.errors import MemfitError, ToldToEnd

__all__ = ["main", "run"]

_FAILED = 1
_INTERRUPTED = 130


class _Group(click.Group):
    """A group of commands; every error that a user caused ends with one sentence."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise explained(error, self.commands) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if getattr(error, "possibilities", None):
                raise
            hint = f"A model comes after a command, as in `memfit probe {args[0]}`."
            raise click.UsageError(f"{error.message} {hint}", ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.NoSuchOption as error:
            raise explained(error, self.commands) from None
        except MemfitError as error:
            _end(str(error), error.exit_code)
        except Exception as error:
            # An error raised in the model's own step is the model's. Any other error is a bug in
            # memfit, and its traceback is shown.
            if not getattr(error, "raised_in_step", False):
                raise
            first = str(error).strip().partition("\n")[0]
            _end(f"the training step raised {type(error).__name__}: {first}", _FAILED)
        except ToldToEnd as ending:
            _end("was told to end, and has ended the command.", ending.exit_code)
        except KeyboardInterrupt:
            _end("interrupted; everything is as it was.", _INTERRUPTED)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="memfit")
@click.pass_context
def main(context: click.Context) -> None:
    """Find the largest batch size that fits, before the run."""
    found = find_table(Path.cwd())
    if found is None:
        return
    path, table = found
    name = context.invoked_subcommand or ""
    own = defaults_of(path, table, main.commands, name)
    if own:
        context.default_map = {name: parameters_of(own, main.commands[name])}
        context.meta[FROM_PROJECT] = path, own


def run() -> NoReturn:
    """Run the command line as a program, and end the process without cleaning up."""
    code = _FAILED
    try:
        main()
    except SystemExit as ending:
        code = _exit_code(ending.code)
    except BaseException:  # noqa: BLE001 - a bug of memfit's; shown as Python would
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # A normal exit would first clean up torch, which takes seconds and is not needed.
    os._exit(code)


def _exit_code(code: object) -> int:
    """Return the exit code as Python does: a text is printed, and the code is 1."""
    if code is None or isinstance(code, int):
        return code or 0
    click.echo(str(code), err=True)
    return _FAILED


def _end(sentence: str, exit_code: int) -> NoReturn:
    click.echo(f"memfit: {sentence}", err=True)
    sys.exit(exit_code)


def _register() -> None:
    from memfit.cli.choose import choose
    from memfit.cli.gpus import gpus
    from memfit.cli.plan import plan
    from memfit.cli.probe import probe
    from memfit.cli.profile import profile
    from memfit.cli.rehearse import rehearse
    from memfit.cli.sweep import sweep
    from memfit.cli.verify import verify

    main.add_command(choose)
    main.add_command(gpus)
    main.add_command(plan)
    main.add_command(probe)
    main.add_command(profile)
    main.add_command(rehearse)
    main.add_command(sweep)
    main.add_command(verify)


_register()
