"""`memfit verify`: do accumulated gradients equal the full batch's?"""

from __future__ import annotations

import sys

import click

from memfit.cli.asking import under_way
from memfit.cli.commands import Command, Switch
from memfit.cli.completion import complete_models
from memfit.cli.options import Given, shared_options
from memfit.cli.output import print_json
from memfit.cli.subjects import name_of, subject_of
from memfit.units import parse_count

__all__ = ["verify"]

_DIFFERS = 4


@click.command(cls=Command, short_help="Prove that accumulated gradients equal the full batch's.")
@click.argument("model", shell_complete=complete_models)
@click.option(
    "--micro-batch", "micro_batch_size", type=int, required=True, help="Samples in a micro-batch."
)
@click.option(
    "--accumulation-steps",
    type=int,
    required=True,
    help="Micro-batches before each optimizer step.",
)
@shared_options(searches=False, has_cards=False)
@click.option(
    "--samples",
    type=int,
    help=(
        "The largest number of samples in any comparison.  [default: 8 in "
        "float64, all in the precision of training]"
    ),
)
@click.option(
    "--freeze-bn",
    cls=Switch,
    help=("Freeze the layers that mix samples (evaluation mode), if that stops the mixing."),
)
@click.option("--json", "as_json", cls=Switch, help="Print the result as JSON.")
def verify(
    *,
    model: str,
    micro_batch_size: int,
    accumulation_steps: int,
    given: Given,
    samples: int | None,
    freeze_bn: bool,
    as_json: bool,
) -> None:
    """Prove that MODEL's accumulated gradients equal the full batch's, or say what differs.

    MODEL is the name of a timm model, or package.module:function, a function of yours that returns
    a memfit.Workload. Gradients are compared first in float64 on the CPU, then in
    the precision and on the device of training. Experiments find the layers that mix samples. The
    exit code is 0 if the gradients are equal, and 4 if they are not.
    """
    parse_count("The micro-batch size", micro_batch_size)
    from memfit import api
    from memfit.reports.equivalence import render

    subject = subject_of(model)
    with under_way(f"building {name_of(subject)}") as bar:
        result = api.verify(
            subject,
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
            device=given.device,
            samples=samples,
            freeze_bn=freeze_bn,
            progress=bar.stage,
            **given.keywords,
        )
    if as_json:
        print_json([result])
    else:
        from rich.console import Console

        Console().print(render(result))
    if not result.equal:
        sys.exit(_DIFFERS)
