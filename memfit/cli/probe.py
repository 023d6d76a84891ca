"""`memfit probe`: the largest batch size that fits."""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.live import Live

from memfit.cli.options import parse_model_kwargs, step_options

__all__ = ["probe"]


@click.command(short_help="Find the largest batch size that fits a device.")
@click.argument("model")
@click.option(
    "--device",
    help="cuda, cuda:1 or cpu; by default a GPU if there is one, else common GPUs are simulated.",
)
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="NAME",
    help="Simulate this GPU instead (see `memfit gpus`), or `any` with --memory; may be repeated.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="What training may use, such as 8GiB: a cap on the GPU's allocator, or a limit beyond the "
    "loaded process on a CPU. What the card has, for a simulated one.",
)
@step_options
@click.option("--accumulate", is_flag=True, help="Probe the micro-batch of accumulated steps.")
@click.option(
    "--headroom",
    type=float,
    default=0.05,
    show_default=True,
    help="Share of the memory that the recommendation keeps free.",
)
@click.option(
    "--multiple-of",
    type=int,
    default=1,
    show_default=True,
    help="Recommend a multiple of this.",
)
@click.option("--max-batch-size", type=int, help="Stop searching here.  [default: 65536]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def probe(
    *,
    model: str,
    device: str | None,
    gpus: tuple[str, ...],
    memory: str | None,
    precision: str,
    optimizer: str,
    image_size: str | None,
    num_classes: int | None,
    channels_last: bool,
    grad_checkpointing: bool,
    model_kwargs: tuple[str, ...],
    accumulate: bool,
    headroom: float,
    multiple_of: int,
    max_batch_size: int | None,
    as_json: bool,
) -> None:
    """Find the largest batch size of a training step of MODEL that fits, and prove it.

    MODEL is the name of a timm model, such as resnet50 or vit_base_patch16_224. Real steps run on
    the device; the answer fitted, and one sample more ran out of memory. With --gpu nothing runs:
    the step's allocations are replayed on a model of that card, and the answer says simulated.
    """
    from memfit import api

    if device is None and (len(gpus) > 1 or not (gpus or api.has_gpu())):
        found = api.survey(
            model,
            gpus=gpus or None,
            memory=memory,
            precision=precision,
            optimizer=optimizer,
            image_size=image_size,
            num_classes=num_classes,
            channels_last=channels_last,
            grad_checkpointing=grad_checkpointing,
            model_kwargs=parse_model_kwargs(model_kwargs),
            accumulate=accumulate,
            headroom=headroom,
            multiple_of=multiple_of,
            max_batch_size=max_batch_size,
        )
        if as_json:
            click.echo(json.dumps(found.to_dict(), indent=2))
        else:
            from memfit.reports import survey

            Console().print(survey.render(found))
        return
    from memfit.reports.probe import ProgressTable, render

    log = Console(stderr=True)
    table = ProgressTable()
    with Live(table, console=log, transient=True, refresh_per_second=4) as live:
        if as_json or not log.is_terminal:
            live.stop()
        result = api.probe(
            model,
            device=device,
            gpu=gpus[0] if gpus else None,
            memory=memory,
            precision=precision,
            optimizer=optimizer,
            image_size=image_size,
            num_classes=num_classes,
            channels_last=channels_last,
            grad_checkpointing=grad_checkpointing,
            model_kwargs=parse_model_kwargs(model_kwargs),
            accumulate=accumulate,
            headroom=headroom,
            multiple_of=multiple_of,
            max_batch_size=max_batch_size,
            progress=table.add,
        )
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
    else:
        Console().print(render(result))
