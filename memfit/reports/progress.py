"""Shows progress in a terminal or a notebook: the trials of a search, or stages of work."""

from __future__ import annotations

import html
import threading
import time
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleRenderable, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from memfit.records import Trial
from memfit.reports.probe import trial_table
from memfit.units import format_bytes

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Progress"]

_QUIET_SECONDS = 2.0
"""What takes no longer shows nothing."""
_NUM_TRIALS = 12
"""The last trials are shown, so that a long search does not fill the screen."""
_BAR_WIDTH = 40
_LEAST_BAR_WIDTH = 8
"""A narrower bar says nothing."""
_AROUND_WORDS = 6
"""The columns of the moving sign, of the spaces before and after the words, and of the ^C that a
terminal shows at the end of the line."""


class Progress:
    """Shows what runs after the first two seconds, and removes it at the end.

    Nothing is shown if the output is a file, a pipe or a log.

    Args:
        console: The console for the output; a notebook's cell is found automatically.
        what: The text to show before the first trial or stage.
        quiet_seconds: The time in which nothing is shown.
    """

    def __init__(
        self, console: Console, what: str = "", *, quiet_seconds: float = _QUIET_SECONDS
    ) -> None:
        self._console = console
        self._what = what
        self._done = 0
        self._total: int | None = None
        self._trials: list[Trial] = []
        self._begin = time.monotonic()
        self._quiet_seconds = quiet_seconds
        self._spinner = Spinner("dots")
        self._live: Live | None = None
        self._cell: Any = None
        self._lock = threading.Lock()

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The trials that have ended, of the stage that runs."""
        return tuple(self._trials)

    def trial(self, trial: Trial) -> None:
        """Record a trial that has ended."""
        with self._lock:
            self._trials.append(trial)
        self._update_cell()

    def stage(self, what: str, done: int, total: int) -> None:
        """Record the stage that begins.

        Args:
            what: The stage, in a few words.
            done: The number of stages that have ended.
            total: The number of all stages.
        """
        with self._lock:
            if (what, done) != (self._what, self._done):
                self._trials = []
            self._what, self._done, self._total = what, done, total
        self._update_cell()

    def __enter__(self) -> Self:
        """Start to show progress."""
        self._begin = time.monotonic()
        if self._console.is_jupyter:
            from IPython.display import HTML, display

            self._cell = display(HTML(""), display_id=True)
        elif self._console.is_terminal:
            self._live = Live(
                console=self._console,
                transient=True,
                refresh_per_second=4,
                get_renderable=self.__rich__,
            )
            self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Remove the progress display."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._cell is not None:
            self._show_in_cell("")
            self._cell = None

    def __rich__(self) -> ConsoleRenderable:
        """Return the bar or a moving sign, and the trials so far."""
        took = time.monotonic() - self._begin
        if took < self._quiet_seconds:
            return Text("")
        with self._lock:
            line = Table.grid(padding=(0, 1))
            words = self._words(took)
            self._spinner.update(text=words)
            # A line that wraps jumps with each second, and Ctrl-C leaves half of it behind.
            room = self._console.width - cell_len(words) - _AROUND_WORDS
            if self._total is None or room < _LEAST_BAR_WIDTH:
                line.add_row(self._spinner)
            else:
                width = min(room, _BAR_WIDTH)
                bar = ProgressBar(total=self._total, completed=self._done, width=width)
                line.add_row(self._spinner, bar)
            if not self._trials:
                return line
            return Group(trial_table(tuple(self._trials[-_NUM_TRIALS:])), line)

    def _words(self, took: float) -> str:
        """Return text about what runs, what has ended, and the time taken."""
        said = [self._what] if self._what else []
        if self._total is not None:
            said.append(f"{self._done} of {self._total} done")
        if self._trials:
            num_trials = len(self._trials)
            said.append("1 trial so far" if num_trials == 1 else f"{num_trials} trials")
        return ", ".join([*said, f"{took:.0f} s"])

    def _update_cell(self) -> None:
        if self._cell is None:
            return
        took = time.monotonic() - self._begin
        with self._lock:
            total = "" if self._total is None else f' max="{self._total}" value="{self._done}"'
            last = ""
            if self._trials:
                trial = self._trials[-1]
                peak = trial.peak_reserved_bytes
                outcome = "fits" if trial.fits else "ran out of memory"
                held = "" if peak is None else f" ({format_bytes(peak)})"
                last = f", last: {trial.batch_size} {outcome}{held}"
            words = html.escape(f"{self._words(took)}{last}")
        self._show_in_cell(f"<progress{total}></progress> {words}")

    def _show_in_cell(self, text: str) -> None:
        from IPython.display import HTML

        self._cell.update(HTML(text))
