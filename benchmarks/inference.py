"""How right `evaluate` is, against timm's published inference benchmarks of three cards.

    python benchmarks/inference.py --data FILE [--engine simulate|rehearse] [--sample N] [--seed S]
                                   [--rows FILE] [--torch RELEASE] [--compiled]

FILE is a table with the columns model, gpu, torch, memory_format, precision, compiled, image_size,
batch_size_that_fit and batch_size_that_failed. timm's benchmark starts at 1024 and steps down a
ladder of batch sizes on any error. Its forward pass is in amp-fp16, with `cudnn.benchmark` on. It
runs under `no_grad`, and since timm 1.0.17 (the rows of torch 2.9) under `inference_mode`. A row is
exact if the same loop ends at the same rung here. What a failed attempt leaves behind is in
`inference_ladders.py`, and what operators of those releases refuse in `inference_loops.py`. Only
rows with a failing size are taken, eager ones, or compiled ones with --compiled. One of the
published eager runs began at 512: no row of it is above, and tiny models are at 512 too. So a row
at the largest size of its run has no failing size, whatever the table says. docs/accuracy.md says
how to read the output. With --rows, a line of JSON is kept for each row, and a run that was
interrupted goes on where it stopped. --torch takes the rows of one release only, so that it can run
with the timm of that time: put it first in PYTHONPATH (1.0.9 for torch 2.4, 1.0.24 for torch 2.9).

With --compiled (rehearsed only), the model is compiled as by --torchcompile of timm's benchmark.
Every attempt is a compilation, which takes a minute, so the ladder is not walked from its top. The
first attempt is at the published size that failed. It must run out. The second one is at the size
that fitted, after the first as in timm's loop. It must fit. Where one of the two does otherwise,
the walk goes on up or down until the edge is found, with 4 attempts at most. What attempts above
the first would have left behind is not there. A row that takes more than 4 minutes of a core is
given up and counted as not tried. Without its line in the rows file it is tried again, and what was
compiled is found in memfit's cache.

Some runs had norms that compute in half precision (`--fast-norm`). The table does not say which,
but bytes do: without it, rows of such a run need more than the card has at the size that fitted.
It is one switch for a whole run of hundreds of rows (`_CARDS_WITHOUT_FAST_NORM`).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime as dt
import json
import os
import platform
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference_ladders import Attempt, Walk

LADDER = (1024, 768, 512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
Run = tuple[str, ...]
# Published runs to compare: two of one memory size, twice, and two that differ by a third. In the
# last pair, rows at the same rung ended for another reason than memory.
_COMPARED: tuple[tuple[Run, Run], ...] = (
    (("RTX 3090", "2.4.0", "nchw"), ("RTX 4090", "2.4.0", "nchw")),
    (("RTX 4090", "2.4.0", "nchw"), ("RTX 4090", "2.9.1", "nchw")),
    (("RTX 4090", "2.9.1", "nchw"), ("RTX 5090", "2.9.1", "nchw")),
)
CARDS = {"RTX 3090": "rtx3090", "RTX 4090": "rtx4090", "RTX 5090": "rtx5090"}
# Torch measures a failed allocation against the card; a rung that needs less than this share of it
# failed for another reason than memory.
_FAR_BELOW = 0.7
_NEARLY_FULL = 0.95
# What a desktop or the kernels that cuDNN loads to try plans may take of a card.
_LESS_ROOM = 0.98


def main() -> None:
    """Try every row, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE")
    parser.add_argument("--engine", choices=("simulate", "rehearse"), default="simulate")
    parser.add_argument("--sample", type=int, metavar="N", help="only so many models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=Path, metavar="FILE", help="keep rows here and go on")
    parser.add_argument("--torch", metavar="RELEASE", help="only rows of it, such as 2.4")
    parser.add_argument("--compiled", action="store_true", help="the rows of torch.compile")
    arguments = parser.parse_args()
    if arguments.compiled:
        if arguments.engine != "rehearse":
            parser.error("compiled models are not simulated: --compiled needs --engine rehearse")
        # One core compiles. It is read when the process that rehearses imports torch.
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    start = time.perf_counter()
    warnings.filterwarnings("ignore")
    tasks = _tasks(arguments.data, arguments.sample, arguments.seed, is_compiled=arguments.compiled)
    if arguments.torch:
        tasks = [
            [row for row in task if row["torch"].startswith(arguments.torch)] for task in tasks
        ]
    try:
        rows = list(_rows(tasks, arguments.engine, arguments.rows))
    finally:
        if "cards" in _BACKENDS:
            _BACKENDS["cards"].__exit__()
    report(rows, arguments.engine)
    print(f"{len(tasks)} models and layouts in {time.perf_counter() - start:.0f} s")


def _tasks(
    path: Path, sample: int | None, seed: int, *, is_compiled: bool
) -> list[list[dict[str, str]]]:
    """Return the rows of the table, those of one model, image size and layout together."""
    with path.open(newline="") as file:
        kind = [row for row in csv.DictReader(file) if row["compiled"] == str(int(is_compiled))]
    for row in kind:
        run = _run_of(row)
        _BEGINS[run] = max(_BEGINS.get(run, 0), int(row["batch_size_that_fit"]))
    failing = [row for row in kind if row["batch_size_that_failed"]]
    rows = [row for row in failing if int(row["batch_size_that_fit"]) < _BEGINS[_run_of(row)]]
    print(
        f"{len(failing)} {'compiled' if is_compiled else 'eager'} rows name a failing size; "
        f"{len(failing) - len(rows)} of them are at the size that their run began with"
    )
    for one, other in _COMPARED:
        if one in _BEGINS and other in _BEGINS:
            print(_agreement(kind, one, other))
    grouped: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        key = (row["model"], row["image_size"], row["memory_format"])
        grouped.setdefault(key, []).append(row)
    tasks = list(grouped.values())
    random.Random(seed).shuffle(tasks)  # noqa: S311 - a sample
    return tasks if sample is None else tasks[:sample]


def _agreement(rows: list[dict[str, str]], one: Run, other: Run) -> str:
    """Say how often two published runs end at the same rung, where one of them has a failing size.

    If two runs differ only in what a prediction does not know, it can be right no more often.
    """
    ends = {(*_run_of(row), row["model"], row["image_size"]): row for row in rows}
    most = min(_BEGINS[one], _BEGINS[other])
    counts: Counter[str] = Counter()
    for key, row in ends.items():
        partner = ends.get((*other, *key[len(other) :]))
        if key[: len(one)] != one or partner is None:
            continue
        first, second = (int(each["batch_size_that_fit"]) for each in (row, partner))
        if min(first, second) < most:
            counts["same" if first == second else "lower" if second < first else "higher"] += 1
    return (
        f"{' '.join(other)} beside {' '.join(one)}: of {counts.total()} rows "
        f"{counts['same']} at the same rung, {counts['lower']} lower, {counts['higher']} higher"
    )


def _rows(
    tasks: list[list[dict[str, str]]], engine: str, kept: Path | None
) -> Iterator[dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}
    if kept is not None and kept.exists():
        for line in kept.read_text().splitlines():
            row = json.loads(line)
            known[row["key"]] = row
    for done, task in enumerate(tasks):
        for row in task:
            key = "|".join((engine, *row.values()))
            if key not in known:
                known[key] = {"key": key, **row, **_tried(row, engine)}
                if kept is not None:
                    with kept.open("a") as file:
                        file.write(json.dumps(known[key]) + "\n")
            yield known[key]
        print(f"\r{done + 1} of {len(tasks)}", end="", file=sys.stderr, flush=True)


def _run_of(row: dict[str, str]) -> Run:
    return row["gpu"], row["torch"], row["memory_format"]


_BACKENDS: dict[str, Any] = {}
# The batch size that each published run began with.
_BEGINS: dict[Run, int] = {}


def _tried(row: dict[str, str], engine: str) -> dict[str, Any]:
    """Return the largest rung that fits, and what the rungs around the published edge need."""
    import torch

    from memfit.errors import MemfitError

    torch.backends.cudnn.benchmark = True
    fits, failed = int(row["batch_size_that_fit"]), int(row["batch_size_that_failed"])
    try:
        with _trials(row, engine) as trial:
            rungs = [size for size in LADDER if size <= _BEGINS[_run_of(row)]]
            if row["compiled"] == "1":
                return _compiled_result(row, trial, rungs)
            found = trial.rung(rungs)
            with_less = trial.rung(rungs, room_share=_LESS_ROOM) if engine == "simulate" else None
            # How full the card is with nothing left behind, for the rows that are off.
            sizes = () if found == fits else (("fit", fits), ("failed", failed))
            peaks = {
                f"peak_at_{name}": trial.trial(size).peak_reserved_bytes for name, size in sizes
            }
            refusal = trial.refusal
            limits = {
                "most_samples": None if refusal is None else refusal.most_samples,
                "refusal": None if refusal is None else refusal.reason,
            }
    except MemfitError as error:
        return {"found": None, "error": str(error)[:200]}
    except Exception as error:  # noqa: BLE001 - one model of 900 must not end the others
        return {"found": None, "error": f"{type(error).__name__}: {error}"[:200]}
    return {
        "found": found,
        "found_with_less": with_less,
        "error": None,
        "capacity": _CAPACITY[row["gpu"]],
        **peaks,
        **limits,
    }


def _compiled_result(row: dict[str, str], trial: _trials, rungs: list[int]) -> dict[str, Any]:
    """Walk the part of the ladder that decides, because each attempt is a compilation."""
    from inference_ladders import Walk

    failed = int(row["batch_size_that_failed"])
    found, attempts = trial.rehearsed(
        Walk(rungs, rungs.index(failed), _MOST_ATTEMPTS, _MOST_SECONDS)
    )
    error = None
    if found is None:
        is_slow = len(attempts) < _MOST_ATTEMPTS
        error = (
            f"took longer than {_MOST_SECONDS / 60:.0f} minutes of a core"
            if is_slow
            else f"no edge in {_MOST_ATTEMPTS} attempts"
        )
    refusal = trial.refusal
    return {
        "found": found,
        "error": error,
        "capacity": _CAPACITY[row["gpu"]],
        "peak_at_failed": attempts[0].peak_reserved_bytes if attempts else None,
        "attempts": [dataclasses.asdict(attempt) for attempt in attempts],
        "most_samples": None if refusal is None else refusal.most_samples,
        "refusal": None if refusal is None else refusal.reason,
    }


_CAPACITY: dict[str, int] = {}
_MOST_ATTEMPTS = 4
_MOST_SECONDS = 240.0
# The runs with --fast-norm are all but that of the RTX 5090.
_CARDS_WITHOUT_FAST_NORM = ("RTX 5090",)

_INFERENCE_MODE_SINCE = "2.9"
_SCORES_IN_FP32_SINCE = "2.5"


class _trials:  # noqa: N801 - used as a function
    """Trials of a row's forward pass on its card."""

    def __init__(self, row: dict[str, str], engine: str) -> None:
        import torch
        from inference_loops import InHalf, InputsMadeOnce, refusals_of
        from ladders import Images

        from memfit.api.cards import Cards
        from memfit.api.steps import describe
        from memfit.backends.simulated import SimulatedBackend
        from memfit.cards import find_gpu
        from memfit.records import Engine

        self._in_half = InHalf(
            norms=row["gpu"] not in _CARDS_WITHOUT_FAST_NORM,
            scores=row["torch"] < _SCORES_IN_FP32_SINCE,
        )
        self._in_half.set()
        self._step = describe(
            row["model"],
            precision="amp-fp16",
            image_size=int(row["image_size"]),
            channels_last=row["memory_format"] == "nhwc",
            evaluate=True,
            no_grad=row["torch"] < _INFERENCE_MODE_SINCE,
            compile=row["compiled"] == "1",
        )
        self._images = Images(int(row["image_size"]), is_last=row["memory_format"] == "nhwc")
        key = "|".join(
            (
                *(row[name] for name in ("model", "image_size", "memory_format")),
                f"{self._step.options.no_grad} {self._in_half}",
            )
        )
        if _BACKENDS.get("key") != key:
            _BACKENDS.update(key=key, traces=InputsMadeOnce(), step=self._step)
        if "cards" not in _BACKENDS:
            # One process rehearses all rows, because each start takes seconds.
            _BACKENDS["cards"] = Cards(Engine(engine)).__enter__()
        self._step = _BACKENDS["step"]
        self._traces = _BACKENDS["traces"]
        if engine == "simulate":
            gpu = find_gpu(CARDS[row["gpu"]])
            self._card: Any = SimulatedBackend(gpu, traces=self._traces)
        else:
            self._card = _BACKENDS["cards"].open(CARDS[row["gpu"]], None, self._step)
        self._known: dict[int, Any] = {}
        self._gpu = row["gpu"]
        refusals = refusals_of(
            self._step.prepare(torch.device("meta")).model,
            int(row["image_size"]),
            is_last=row["memory_format"] == "nhwc",
            is_compiled=row["compiled"] == "1",
            release=row["torch"],
        )
        self.refusal = min(refusals, key=lambda refusal: refusal.most_samples, default=None)
        self._most = None if self.refusal is None else self.refusal.most_samples

    def __enter__(self) -> _trials:
        self._card.__enter__()
        _CAPACITY[self._gpu] = self._card.capacity().usable_bytes
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._card.__exit__(*exc_info)

    def rung(self, rungs: list[int], *, room_share: float = 1.0) -> int:
        """Return the batch size at which timm's loop ends, with a share of the card's room."""
        from inference_ladders import Walk
        from ladders import simulated_rung

        from memfit.backends.simulated import SimulatedBackend

        if not isinstance(self._card, SimulatedBackend):
            found, _ = self.rehearsed(Walk(rungs))
            assert found is not None
            return found
        gpu = self._card.gpu
        return simulated_rung(
            self._traces.find(self._step, gpu).schedule_on(gpu, is_rough=False),
            rungs,
            images=self._images,
            capacity_bytes=int(self._card.capacity().usable_bytes * room_share),
            most_samples=self._most,
        )

    def rehearsed(self, walk: Walk) -> tuple[int | None, tuple[Attempt, ...]]:
        """Return the batch size at which a walk on the rehearsed card ends, and its attempts."""
        from inference_ladders import rehearsed_rung

        ended: tuple[int | None, tuple[Attempt, ...]] = self._card.call(
            rehearsed_rung, self._step, walk, self._images, self._most, self._in_half
        )
        return ended

    def trial(self, batch_size: int) -> Any:
        """Try a batch size, once."""
        if batch_size not in self._known:
            self._known[batch_size] = self._card.trial(self._step, batch_size)
        return self._known[batch_size]


def report(rows: list[dict[str, Any]], engine: str) -> None:
    """Print how many rows are exact, by card and layout, and the kinds of the others."""
    import torch

    print(
        f"\n{engine}, torch {torch.__version__}, {platform.machine()}, "
        f"{dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}"
    )
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["gpu"], row["torch"], row["memory_format"]), []).append(row)
    for group, members in sorted(groups.items()):
        print(f"{' '.join(group):28} {_said(Counter(kind_of(row) for row in members))}")
    print(f"{'all':28} {_said(Counter(kind_of(row) for row in rows))}")
    if any(row.get("found_with_less") for row in rows):
        less = [
            {**row, "found": row.get("found_with_less") if row["found"] else None} for row in rows
        ]
        counts = Counter(kind_of(row) for row in less)
        print(f"{f'all, with {1 - _LESS_ROOM:.0%} less room':28} {_said(counts)}")
        wrong = [pair for pair in zip(rows, less, strict=True) if kind_of(pair[0]) != "exact"]
        mended = sum(kind_of(other) == "exact" for _, other in wrong)
        print(f"{mended} of {len(wrong)} that are not exact are exact with the smaller room")
    tried = [row for row in rows if row["found"]]
    rungs = Counter(_rungs_above(row) for row in tried)
    print("rungs above the published one: " + ", ".join(f"{n}: {rungs[n]}" for n in sorted(rungs)))
    high = [row for row in tried if _rungs_above(row) > 0]
    nearly = sum(row["peak_at_failed"] > _NEARLY_FULL * row["capacity"] for row in high)
    print(f"{nearly} of {len(high)} that are too high need over {_NEARLY_FULL:.0%} of the card")
    refused = [
        row
        for row in tried
        if row.get("most_samples") and row["most_samples"] < int(row["batch_size_that_failed"])
    ]
    if refused:
        counts = Counter(kind_of(row) for row in refused)
        print(f"an operator refuses the size that failed: {_said(counts)}")
    print()
    for row in rows:
        kind = kind_of(row)
        if kind != "exact":
            is_exact = row.get("found_with_less") == int(row["batch_size_that_fit"])
            room = "; exact with less room" if is_exact else ""
            need = row.get("peak_at_failed") or 0
            share = need / row["capacity"] if row.get("capacity") else 0
            print(
                f"{kind:12} {row['model']:48} {row['gpu']} {row['torch']} {row['memory_format']} "
                f"{row['image_size']:>4} px: fits {row['batch_size_that_fit']}, found "
                f"{row['found']}; at {row['batch_size_that_failed']} {share:.0%} of the card"
                f"{room} {row['error'] or ''}"
            )
            for attempt in row.get("attempts", ()):
                share = attempt["peak_reserved_bytes"] / row["capacity"]
                print(
                    f"{'':12} {attempt['batch_size']:>4} in {attempt['seconds']:.0f} s: "
                    f"{attempt['error'] or f'fits, {share:.1%} of the card'}"
                )


def _rungs_above(row: dict[str, Any]) -> int:
    return LADDER.index(int(row["batch_size_that_fit"])) - LADDER.index(row["found"])


def kind_of(row: dict[str, Any]) -> str:
    """Return how a row compares with what was published."""
    if row["found"] is None:
        return "not tried"
    difference = row["found"] - int(row["batch_size_that_fit"])
    if difference == 0:
        return "exact"
    if difference < 0:
        return "too low"
    is_far = row.get("peak_at_failed", 0) < _FAR_BELOW * row["capacity"]
    return "far below" if is_far else "too high"


def _said(counts: Counter[str]) -> str:
    total = sum(counts.values())
    return f"{counts['exact'] / total:6.1%} of {total}: " + ", ".join(
        f"{count} {kind}" for kind, count in counts.most_common()
    )


if __name__ == "__main__":
    main()
