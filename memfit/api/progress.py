"""The progress bar of the Python functions, shown in a terminal or a notebook by default.

The command line has its own bar, which looks the same.
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
    """The functions that are told about trials and stages.

    Args:
        trial: Called with each trial that has ended.
        stage: Called with the next stage, the number of stages done, and of all stages.
    """

    trial: Callable[[Trial], None] | None = None
    stage: Callable[[str, int, int], None] | None = None


@contextlib.contextmanager
def watched(
    what: str, *, trials: TrialProgress = None, stages: StageProgress = None
) -> Iterator[Watching]:
    """Show a progress bar while something runs, or report progress to a function.

    Args:
        what: What runs, in a few words.
        trials: `"bar"`, `None`, or a function that is told about trials.
        stages: `"bar"`, `None`, or a function that is told about stages.

    Yields:
        The functions to call.

    Raises:
        UsageError: `trials` or `stages` is neither a function nor `"bar"` nor `None`.
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
