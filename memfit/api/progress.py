"""The bar of the Python interface: shown in a terminal or a notebook, where nothing else is asked.

The command line has its own, around the same picture.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

from rich.console import Console

from memfit.errors import UsageError
from memfit.records import Trial
from memfit.reports.progress import Progress

__all__ = ["StageProgress", "TrialProgress", "Watching", "watched"]

TrialProgress = Callable[[Trial], None] | Literal["bar"] | None
"""Called with each trial that has ended; `"bar"` shows them itself; `None` is silence."""
StageProgress = Callable[[str, int, int], None] | Literal["bar"] | None
"""Called with what runs next, the stages done and those in all; `"bar"` and `None` likewise."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Watching:
    """Who hears of trials and stages.

    Args:
        trial: Called with each trial that has ended.
        stage: Called with what runs next, the stages done and those in all.
    """

    trial: Callable[[Trial], None] | None = None
    stage: Callable[[str, int, int], None] | None = None


@contextlib.contextmanager
def watched(
    what: str, *, trials: TrialProgress = None, stages: StageProgress = None
) -> Iterator[Watching]:
    """Show progress while something runs, if a bar is asked for, or pass it on.

    Args:
        what: What is under way, in a few words.
        trials: Who hears of trials.
        stages: Who hears of stages.

    Yields:
        What is to be called.

    Raises:
        UsageError: It is neither a function nor `"bar"` nor `None`.
    """
    for asked in (trials, stages):
        if asked is not None and asked != "bar" and not callable(asked):
            raise UsageError(f"progress is 'bar', a function or None, not {asked!r}.")
    if trials != "bar" and stages != "bar":
        yield Watching(trial=trials, stage=stages)
        return
    with Progress(Console(stderr=True), what) as bar:
        yield Watching(
            trial=bar.trial if trials is None or trials == "bar" else trials,
            stage=bar.stage if stages is None or stages == "bar" else stages,
        )
