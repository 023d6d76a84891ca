"""Options that a command does not have, although another one has them: which one, and why."""

from __future__ import annotations

from collections.abc import Mapping

import click

__all__ = ["explained"]

_VERIFY_COMPUTES = (
    "verify compares gradients, so it has to compute them, and a card that is not here computes "
    "nothing. Whether accumulation is exact depends on the model, not on the card. Leave the "
    "option out: gradients are compared on the CPU in float64, and then on this machine's GPU "
    "(--device), if it has one."
)
_SWEEP_IS_NOT_HERE = (
    "It tries cards that need not be here (--gpu). To measure on a device of this machine, use "
    "`memfit probe MODEL... --device NAME`."
)
_WHY = {
    ("verify", "--gpu"): _VERIFY_COMPUTES,
    ("verify", "--engine"): _VERIFY_COMPUTES,
    ("verify", "--memory"): _VERIFY_COMPUTES,
    ("sweep", "--device"): _SWEEP_IS_NOT_HERE,
    ("choose", "--device"): _SWEEP_IS_NOT_HERE,
    ("probe", "--batch-size"): (
        "probe searches for the batch size. --max-batch-size says where the search ends; "
        "`memfit profile MODEL --batch-size N` looks at one batch size."
    ),
    ("plan", "--batch-size"): (
        "Give the samples of an optimizer step as --effective-batch. --max-batch-size is the "
        "largest micro-batch of interest."
    ),
}


def explained(
    error: click.NoSuchOption, commands: Mapping[str, click.Command]
) -> click.NoSuchOption:
    """Return the error; where another command has the option, with a sentence that says so.

    Args:
        error: What click raised.
        commands: All commands by name.
    """
    if error.ctx is None or error.ctx.info_name is None:
        return error
    name, option = error.ctx.info_name, error.option_name
    if error.ctx.parent is None:
        owners = _elsewhere(option, commands)
        if owners is None:
            return error
        message = f"No such option: {option}. {owners} Options come after the command's name."
        return click.NoSuchOption(option, message=message, ctx=error.ctx)
    words = _WHY.get((name, option)) or _elsewhere(option, commands)
    if not words:
        return error
    message = f"`memfit {name}` has no option {option}. {words}"
    return click.NoSuchOption(option, message=message, ctx=error.ctx)


def _elsewhere(option: str, commands: Mapping[str, click.Command]) -> str | None:
    """Return a sentence with the commands that have the option."""
    owners = [
        f"`memfit {name}`"
        for name, command in sorted(commands.items())
        if any(option in parameter.opts for parameter in command.params)
    ]
    if not owners:
        return None
    *others, last = owners
    return (
        f"It is an option of {', '.join(others)} and {last}."
        if others
        else (f"It is an option of {last}.")
    )
