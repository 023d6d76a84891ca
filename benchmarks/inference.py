"""How right `evaluate` is, against timm's published inference benchmarks of three cards.

    python benchmarks/inference.py --data FILE [--engine simulate|rehearse] [--sample N] [--seed S]
                                   [--rows FILE] [--fast-norm]

FILE is a table with the columns model, gpu, torch, memory_format, precision, compiled, image_size,
batch_size_that_fit and batch_size_that_failed. timm's benchmark starts at 1024 and steps down a
ladder of batch sizes on any error. Its forward pass runs under `no_grad` in amp-fp16, with
`cudnn.benchmark` on. A row is exact if the same rung is the largest that fits here. Only eager rows
with a failing size are taken. One of the published runs began at 512: no row of it is above, and
tiny models are at 512 too. So a row at the largest size of its run has no failing size, whatever
the table says. A rung fits if the simulation's allocator serves the step, and no operator of that
torch refuses so many samples (`inference_loops.py`). docs/accuracy.md says how to read the output.
With --rows, a line of JSON is kept for each row, and a run that was interrupted goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import json
import platform
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LADDER = (1024, 768, 512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
CARDS = {"RTX 3090": "rtx3090", "RTX 4090": "rtx4090", "RTX 5090": "rtx5090"}
# Torch measures a failed allocation against the card; a rung that needs less than this share of it
# failed for another reason than memory.
_FAR_BELOW = 0.7
_NEARLY_FULL = 0.95


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
    parser.add_argument(
        "--fast-norm",
        action="store_true",
        help="norms compute in half precision (--fast-norm of timm's benchmark)",
    )
    arguments = parser.parse_args()
    if arguments.fast_norm:
        import timm

        timm.layers.set_fast_norm(True)
    start = time.perf_counter()
    warnings.filterwarnings("ignore")
    tasks = _tasks(arguments.data, arguments.sample, arguments.seed)
    rows = list(_rows(tasks, arguments.engine, arguments.rows))
    report(rows, arguments.engine)
    print(f"{len(tasks)} models and layouts in {time.perf_counter() - start:.0f} s")


def _tasks(path: Path, sample: int | None, seed: int) -> list[list[dict[str, str]]]:
    """Return the rows of the table, those of one model, image size and layout together."""
    with path.open(newline="") as file:
        eager = [row for row in csv.DictReader(file) if row["compiled"] == "0"]
    begins: dict[tuple[str, ...], int] = {}
    for row in eager:
        run = (row["gpu"], row["torch"], row["memory_format"])
        begins[run] = max(begins.get(run, 0), int(row["batch_size_that_fit"]))
    failing = [row for row in eager if row["batch_size_that_failed"]]
    rows = [
        row
        for row in failing
        if int(row["batch_size_that_fit"]) < begins[row["gpu"], row["torch"], row["memory_format"]]
    ]
    print(
        f"{len(failing)} eager rows name a failing size; {len(failing) - len(rows)} of them are at "
        "the size that their run began with"
    )
    grouped: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        key = (row["model"], row["image_size"], row["memory_format"])
        grouped.setdefault(key, []).append(row)
    tasks = list(grouped.values())
    random.Random(seed).shuffle(tasks)  # noqa: S311 - a sample
    return tasks if sample is None else tasks[:sample]


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


_BACKENDS: dict[str, Any] = {}


def _tried(row: dict[str, str], engine: str) -> dict[str, Any]:
    """Return the largest rung that fits, and what the rungs around the published edge need."""
    import torch

    from memfit.errors import MemfitError

    torch.backends.cudnn.benchmark = True
    fits, failed = int(row["batch_size_that_fit"]), int(row["batch_size_that_failed"])
    try:
        with _trials(row, engine) as trial:
            found = _largest(trial, fits)
            peaks = {
                f"peak_at_{name}": trial.trial(size).peak_reserved_bytes
                for name, size in (("fit", fits), ("failed", failed))
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
    return {"found": found, "error": None, "capacity": _CAPACITY[row["gpu"]], **peaks, **limits}


_CAPACITY: dict[str, int] = {}


class _trials:  # noqa: N801 - used as a function
    """Trials of a row's forward pass on its card."""

    def __init__(self, row: dict[str, str], engine: str) -> None:
        import torch
        from inference_loops import InputsMadeOnce, refusals_of

        from memfit.api.cards import Cards
        from memfit.api.steps import describe
        from memfit.backends.simulated import SimulatedBackend
        from memfit.cards import find_gpu
        from memfit.records import Engine

        self._step = describe(
            row["model"],
            precision="amp-fp16",
            image_size=int(row["image_size"]),
            channels_last=row["memory_format"] == "nhwc",
            evaluate=True,
            no_grad=True,
        )
        key = "|".join((row["model"], row["image_size"], row["memory_format"]))
        if _BACKENDS.get("key") != key:
            if "cards" in _BACKENDS:
                _BACKENDS.pop("cards").__exit__()
            _BACKENDS.update(
                key=key,
                cards=Cards(Engine(engine)).__enter__(),
                traces=InputsMadeOnce(),
                step=self._step,
            )
        self._step = _BACKENDS["step"]
        if engine == "simulate":
            gpu = find_gpu(CARDS[row["gpu"]])
            self._card: Any = SimulatedBackend(gpu, traces=_BACKENDS["traces"])
        else:
            self._card = _BACKENDS["cards"].open(CARDS[row["gpu"]], None, self._step)
        self._known: dict[int, Any] = {}
        self._gpu = row["gpu"]
        refusals = refusals_of(
            self._step.prepare(torch.device("meta")).model,
            int(row["image_size"]),
            is_last=row["memory_format"] == "nhwc",
            release=row["torch"],
        )
        self.refusal = min(refusals, key=lambda refusal: refusal.most_samples, default=None)

    def __enter__(self) -> _trials:
        self._card.__enter__()
        _CAPACITY[self._gpu] = self._card.capacity().usable_bytes
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._card.__exit__(*exc_info)

    def fits(self, batch_size: int) -> bool:
        """Whether the batch size fits, and no operator refuses it."""
        if self.refusal is not None and batch_size > self.refusal.most_samples:
            return False
        return bool(self.trial(batch_size).fits)

    def trial(self, batch_size: int) -> Any:
        """Try a batch size, once."""
        if batch_size not in self._known:
            self._known[batch_size] = self._card.trial(self._step, batch_size)
        return self._known[batch_size]


def _largest(trial: _trials, start: int) -> int:
    """Return the largest rung that fits, searched from a rung on."""
    at = LADDER.index(start)
    if trial.fits(LADDER[at]):
        while at and trial.fits(LADDER[at - 1]):
            at -= 1
        return LADDER[at]
    while at + 1 < len(LADDER):
        at += 1
        if trial.fits(LADDER[at]):
            return LADDER[at]
    return 0


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
    tried = [row for row in rows if row["found"]]
    rungs = Counter(_rungs_above(row) for row in tried)
    print("rungs above the published one: " + ", ".join(f"{n}: {rungs[n]}" for n in sorted(rungs)))
    high = [row for row in tried if _rungs_above(row) > 0]
    nearly = sum(row["peak_at_failed"] > _NEARLY_FULL * row["capacity"] for row in high)
    print(f"{nearly} of {len(high)} that are too high need over {_NEARLY_FULL:.0%} of the card")
    print()
    for row in rows:
        kind = kind_of(row)
        if kind != "exact":
            need = row.get("peak_at_failed") or 0
            share = need / row["capacity"] if row.get("capacity") else 0
            print(
                f"{kind:12} {row['model']:48} {row['gpu']} {row['torch']} {row['memory_format']} "
                f"{row['image_size']:>4} px: fits {row['batch_size_that_fit']}, found "
                f"{row['found']}; at {row['batch_size_that_failed']} {share:.0%} of the card "
                f"{row['error'] or ''}"
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
    is_far = row["peak_at_failed"] < _FAR_BELOW * row["capacity"]
    return "far below" if is_far else "too high"


def _said(counts: Counter[str]) -> str:
    total = sum(counts.values())
    return f"{counts['exact'] / total:6.1%} of {total}: " + ", ".join(
        f"{count} {kind}" for kind, count in counts.most_common()
    )


if __name__ == "__main__":
    main()
