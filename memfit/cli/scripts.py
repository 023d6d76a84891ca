"""`memfit probe` and `memfit plan` for a user's own command, written after two dashes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memfit.cli.asking import under_way
from memfit.cli.commands import is_typed
from memfit.cli.options import Given
from memfit.cli.output import check_writable, print_json, write
from memfit.errors import UsageError
from memfit.records import CommandPlan, CommandProbe, Record
from memfit.units import parse_bytes

if TYPE_CHECKING:
    from memfit.rehearsal.ranks import LoneRank

__all__ = ["is_script", "plan_script", "probe_script"]

_SHARED = ("models", "gpus", "memory", "headroom", "multiple_of", "as_json")
_OF_PROBE = (*_SHARED, "max_batch_size", "world_size", "html")
_OF_PLAN = (*_SHARED, "effective_batch_size", "world_size")


def is_script(words: tuple[str, ...]) -> bool:
    """Whether the words after `memfit probe` or `memfit plan` are a command and not models."""
    has_place = any("{}" in word for word in words)
    return has_place or (len(words) > 1 and shutil.which(words[0]) is not None)


def probe_script(
    words: tuple[str, ...],
    given: Given,
    *,
    world_size: int,
    as_json: bool,
    html: Path | None = None,
) -> None:
    """Find the largest batch size of a command.

    Args:
        words: The command's words.
        given: The options that the user gave.
        world_size: The number of ranks; with several, each run is rank 0 of so many.
        as_json: Print JSON.
        html: Write the result to this file as a page.
    """
    from memfit.rehearsal.ranks import LoneRank, refuse_launcher
    from memfit.rehearsal.scripts import Progress, ScriptSearch, probe_command
    from memfit.reports.rehearsal import render_probe

    _refuse_others(words, _OF_PROBE)
    check_writable(html)
    if html is not None and len(given.gpus) > 1:
        raise UsageError("--html shows one card. Give one --gpu.")

    def run(search: ScriptSearch, progress: Progress) -> CommandProbe:
        return probe_command(words, search, progress=progress)

    if world_size > 1 and not given.gpus:
        raise UsageError("--world-size rehearses one rank of many: name a card with --gpu.")
    lone_rank = None
    if world_size != 1:
        refuse_launcher(words)
        lone_rank = LoneRank(rank=0, world_size=world_size)
    found = _on_cards(words, run, given, lone_rank)
    if html is not None:
        from memfit.reports.probe_page import command_page

        (only,) = found
        write(html, command_page(only))
        found = iter((only,))
    _show(found, render_probe, as_json=as_json)


def plan_script(
    words: tuple[str, ...],
    effective_batch_size: Any,
    given: Given,
    *,
    world_size: int,
    as_json: bool,
) -> None:
    """Turn an effective batch size into a command with micro-batches that fit.

    Args:
        words: The command's words.
        effective_batch_size: Samples in each optimizer step.
        given: The options that the user gave.
        world_size: The number of ranks that share these samples.
        as_json: Print JSON.
    """
    from memfit.rehearsal.ranks import LoneRank, launcher_of
    from memfit.rehearsal.scripts import Progress, ScriptSearch, plan_command
    from memfit.reports.rehearsal import render_plan

    _refuse_others(words, _OF_PLAN)

    def run(search: ScriptSearch, progress: Progress) -> CommandPlan:
        return plan_command(
            words, effective_batch_size, search, world_size=world_size, progress=progress
        )

    # A launcher starts the ranks itself. On a GPU that is here, no rank can be alone.
    is_alone = world_size > 1 and bool(given.gpus) and launcher_of(words) is None
    lone_rank = LoneRank(rank=0, world_size=world_size) if is_alone else None
    _show(_on_cards(words, run, given, lone_rank), render_plan, as_json=as_json)


def _on_cards(
    words: tuple[str, ...],
    run: Callable[..., Any],
    given: Given,
    lone_rank: LoneRank | None,
) -> Iterator[Any]:
    """Yield the result for one card after another, or for this machine's GPU."""
    from memfit.cards import Gpu, find_gpu
    from memfit.rehearsal.activate import rehearsed_environment
    from memfit.rehearsal.children import raising_when_told_to_end
    from memfit.rehearsal.ranks import num_launched
    from memfit.rehearsal.scripts import ScriptSearch

    if given.memory is not None and not given.gpus:
        raise UsageError(
            "--memory says how much memory a card of --gpu has. Name a card with "
            "--gpu, or give --gpu any."
        )
    total_bytes = None if given.memory is None else parse_bytes(given.memory)
    cards: list[Gpu | None] = [find_gpu(name, total_bytes=total_bytes) for name in given.gpus]
    num_gpus = num_launched(words) if lone_rank is None else lone_rank.gpus_of_node
    for card in cards or [None]:
        environment = (
            {}
            if card is None
            else rehearsed_environment(card, num_gpus=num_gpus, environment=os.environ)
        )
        with raising_when_told_to_end(), under_way("running the command") as bar:
            search = ScriptSearch(
                gpu=card, environment=environment, lone_rank=lone_rank, **given.search
            )
            found = run(search, bar.trial)
        yield found


def _show(found: Iterator[Record], render: Callable[[Any], Any], *, as_json: bool) -> None:
    if as_json:
        print_json(list(found))
        return
    from rich.console import Console

    for each in found:
        Console().print(render(each))


def _refuse_others(words: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    """Refuse options for timm models, because a command has its own options."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if is_typed(context, name) and name not in allowed:
            raise UsageError(
                f"{parameter.opts[0]} cannot be given with a command after --: "
                f"{words[0]!r} has its own options."
            )
