"""Options that a command does not have."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from memfit.cli import main


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("verify resnet18 --gpu t4", "`memfit verify` has no option --gpu. verify compares"),
        ("verify resnet18 --memory 8GiB", "and a card that is not here computes nothing."),
        ("sweep resnet18 --device cpu", "use `memfit probe MODEL... --device NAME`."),
        ("probe resnet18 --batch-size 8", "`memfit profile MODEL --batch-size N` looks at one"),
        ("profile resnet18 --emit timm", "It is an option of `memfit plan`."),
        ("gpus --effective-batch 8", "It is an option of `memfit choose` and `memfit plan`."),
        ("--gpu t4 probe resnet18", "Options come after the command's name."),
        ("probe resnet18 --max-batchsize 8", "'--max-batch-size'"),
        ("resnet18", "A model comes after a command, as in `memfit probe resnet18`."),
        ("prob resnet18", "Did you mean 'probe'?"),
    ],
)
def test_another_commands_option_is_explained(typed: str, says: str) -> None:
    """The message says which command has it, or what this command does instead."""
    result = CliRunner().invoke(main, typed.split())
    assert result.exit_code == 2
    assert says in result.stderr
