"""`sweep`: runs the tasks of many models, here or on a cluster, and puts the answers in order."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from typing_extensions import Unpack

from memfit.api.asking import Asked, SearchKeywords, cards_named
from memfit.api.progress import StageProgress, watched
from memfit.cards import Gpu, find_gpu
from memfit.errors import UsageError
from memfit.records import ChoiceRow, Engine, Precision, Sweep, SweepRow
from memfit.rehearsal.engines import engine_for_several
from memfit.sweeping.cluster import RayPool
from memfit.sweeping.journal import Journal, default_path
from memfit.sweeping.selection import Selected, select
from memfit.sweeping.tasks import SweepTask, versions
from memfit.sweeping.workers import LocalPool, num_workers_for
from memfit.units import parse_bytes, parse_count, parse_image_size

__all__ = ["AUTO_JOURNAL", "Pool", "answered", "cards_of", "cards_to_try", "pool_for", "sweep"]

AUTO_JOURNAL: Literal["auto"] = "auto"
"""A journal in the user's cache, which is deleted when the sweep is complete."""

_Row = TypeVar("_Row", SweepRow, ChoiceRow)


class Pool(Protocol):
    """Whatever runs tasks: processes here, or a cluster."""

    def run(self, tasks: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """Run tasks, and yield each with its answer as soon as it is known."""


def sweep(
    models: str | Iterable[str],
    *,
    gpus: Sequence[str] | None = None,
    image_sizes: Sequence[int | str | tuple[int, int] | None] = (None,),
    precisions: Sequence[str] = ("auto",),
    optimizers: Sequence[str] = ("adamw",),
    workers: int | None = None,
    ray: str | None = None,
    quick: bool = False,
    journal: str | Path | None = None,
    progress: StageProgress = "bar",
    on_rows: Callable[[tuple[SweepRow, ...]], None] | None = None,
    **options: Unpack[SearchKeywords],
) -> Sweep:
    """Find the batch sizes of many timm models on many cards that are not in this machine.

    Every combination of a model, an image size, a precision and an optimizer is a training step.
    Each step is traced once for all cards. After Ctrl-C the sweep returns what is done, with
    `is_complete` false; with a journal, the same call goes on from there.

    Args:
        models: Names, wildcards such as `"convnext_*"`, `"all"`, or a text file with one a line.
            An image size can follow an `@`, as in `"convnext_tiny@288"`.
        gpus: Names of the catalogue. Default: a dozen common cards; with `memory`, one card with
            that much memory.
        image_sizes: The image sizes; `None` is each model's own.
        precisions: The precisions. With `"auto"`, each card uses its own.
        optimizers: Names of timm's optimizers.
        workers: Processes that run at a time; by default as many as there are cores and memory for.
        ray: `"auto"` or the address of a Ray cluster that runs the tasks instead. It needs the
            extra `memfit[sweep]`.
        quick: Do not ask the installed cuDNN for the workspaces of convolutions, and use a bound
            in their place, as where it is not installed. Convolutional models are several times
            quicker. The largest batch changes little; the recommended one can be a tenth too large.
        journal: The file that keeps what is done; `"auto"` for a file in the user's cache, which is
            deleted at the end; `None` keeps nothing.
        progress: `"bar"`, `None`, or a function. The function is called with what runs, the number
            of steps done, and the number of all steps.
        on_rows: Called with the rows of each step when they are known.
        **options: The search and the step, as in `survey`. Engine `"auto"` simulates.

    Returns:
        A row for each training step and card. What cannot be tried has a row with the reason.

    Raises:
        UsageError: An argument is not valid.
        UnsupportedError: Ray is not installed, or its cluster has several versions.
    """
    selected = select(models)
    cards = cards_to_try(gpus, options)
    devices = tuple(card.name for card in cards_of(cards, options))
    if quick and engine_for_several(options.get("engine", Engine.AUTO)) is Engine.REHEARSE:
        raise UsageError("quick is for simulated cards: a rehearsal asks cuDNN itself.")
    lists = {"image_size": image_sizes, "precision": precisions, "optimizer": optimizers}
    for name, given in lists.items():
        if isinstance(given, str) or not given:
            raise UsageError(f"{name}s must be a list with at least one entry, not {given!r}.")
    tasks = tuple(
        SweepTask(model=model.name, gpus=cards, options=given, is_quick=quick)
        for model in selected
        for given in _combined(model, lists, options)
    )
    pool = pool_for(len(tasks), workers=workers, ray=ray)
    with watched("sweeping", stages=progress) as watching:
        done, is_complete = answered(
            tasks, SweepRow, pool, journal=journal, progress=watching.stage, on_rows=on_rows
        )
    known = versions()
    return Sweep(
        rows=tuple(itertools.chain.from_iterable(done[t.key] for t in tasks if t.key in done)),
        gpus=devices,
        num_steps=len(tasks),
        torch_version=known["torch"],
        timm_version=known["timm"],
        is_complete=is_complete,
        is_quick=quick,
    )


def cards_of(names: Sequence[str], options: SearchKeywords) -> tuple[Gpu, ...]:
    """Look up cards.

    Args:
        names: Names of the catalogue.
        options: The caller's other options; `memory` is what each card has.

    Raises:
        UsageError: There is no such card.
    """
    memory = options.get("memory")
    memory_bytes = None if memory is None else parse_bytes(memory)
    return tuple(find_gpu(name, total_bytes=memory_bytes) for name in names)


def cards_to_try(gpus: Sequence[str] | None, options: SearchKeywords) -> tuple[str, ...]:
    """Return the cards that a caller named, or the common ones; make `memory` a number of bytes.

    Args:
        gpus: Names of the catalogue, if any were given.
        options: The caller's other options, in which `memory` may be text.
    """
    memory = options.get("memory")
    memory_bytes = None if memory is None else parse_bytes(memory)
    if memory_bytes is not None:
        options["memory"] = memory_bytes
    return cards_named(gpus, memory_bytes)


def pool_for(num_tasks: int, *, workers: int | None, ray: str | None) -> Pool:
    """Return what runs the tasks.

    Args:
        num_tasks: How many there are.
        workers: Processes that run at a time; `None` for as many as the machine has room for.
        ray: `"auto"` or the address of a Ray cluster.

    Raises:
        UsageError: Both were given, or `workers` is not a count.
        UnsupportedError: Ray is not installed, or its cluster has several versions.
    """
    if ray is not None:
        if workers is not None:
            raise UsageError("Give workers or ray, not both: a cluster has its own processes.")
        return RayPool(ray, versions())
    if workers is None:
        return LocalPool(num_workers_for(num_tasks))
    return LocalPool(parse_count("workers", workers))


def answered(
    tasks: Sequence[Any],
    kind: type[_Row],
    pool: Pool,
    *,
    journal: str | Path | None,
    progress: Callable[[str, int, int], None] | None,
    on_rows: Callable[[tuple[_Row, ...]], None] | None = None,
    is_enough: Callable[[Mapping[str, tuple[_Row, ...]]], bool] = lambda _: False,
) -> tuple[dict[str, tuple[_Row, ...]], bool]:
    """Answer tasks, those of the journal first.

    Args:
        tasks: The tasks.
        kind: The class of their rows.
        pool: What runs them.
        journal: The file of answers; `"auto"` for one in the user's cache.
        progress: Called with what runs, the number of tasks done, and the number of all tasks.
        on_rows: Called with the rows of each task.
        is_enough: Says after each answer whether the remaining tasks can be left out.

    Returns:
        The answers by the tasks' keys, and whether all tasks were answered. Ctrl-C ends the work
        early, and is not an error here.
    """
    known = versions()
    path = default_path((t.key for t in tasks), known) if journal == AUTO_JOURNAL else journal
    with Journal(None if path is None else Path(path), kind, known) as kept:
        answers = {task.key: kept.answers[task.key] for task in tasks if task.key in kept.answers}
        missing = list({task.key: task for task in tasks if task.key not in answers}.values())
        if on_rows is not None:
            for rows in answers.values():
                on_rows(rows)
        told = _Told(progress, num_known=len(answers), num_all=len(answers) + len(missing))
        is_complete = True
        running = pool.run(missing)
        try:
            told.after(None)
            for task, rows in () if is_enough(answers) else running:
                answers[task.key] = rows
                kept.add(task.key, rows)
                told.after(task)
                if on_rows is not None:
                    on_rows(rows)
                if is_enough(answers):
                    break
        except KeyboardInterrupt:
            is_complete = False
        finally:
            close = getattr(running, "close", None)
            if close is not None:
                close()
        if is_complete and journal == AUTO_JOURNAL:
            kept.delete()
    return answers, is_complete


class _Told:
    """Says how far a sweep is, and how long the rest takes."""

    def __init__(
        self, progress: Callable[[str, int, int], None] | None, *, num_known: int, num_all: int
    ) -> None:
        self._progress = progress
        self._done = self._num_known = num_known
        self._num_all = num_all
        self._begin = time.monotonic()

    def after(self, task: Any) -> None:
        """Say how far it is after a task, or before the first."""
        what = "starting processes"
        if task is not None:
            self._done += 1
            each = (time.monotonic() - self._begin) / (self._done - self._num_known)
            what = f"{task.model}; {_duration((self._num_all - self._done) * each)} left"
        if self._progress is not None:
            self._progress(what, self._done, self._num_all)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"about {minutes:.0f} min" if minutes >= 1 else f"about {seconds:.0f} s"


def _combined(
    model: Selected, lists: Mapping[str, Sequence[Any]], options: SearchKeywords
) -> Iterator[dict[str, Any]]:
    """Yield the options of each combination, and check them."""
    for values in itertools.product(*lists.values()):
        given: dict[str, Any] = {**options, **dict(zip(lists, values, strict=True))}
        size = model.image_size or given["image_size"]
        given["image_size"] = None if size is None else parse_image_size(size)
        Asked.of(model.name, **given)
        given["engine"] = engine_for_several(given.get("engine", Engine.AUTO)).value
        given["precision"] = Precision(given["precision"]).value
        yield given
