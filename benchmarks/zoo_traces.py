"""Trace every model that timm registers: how many trace, which fail and why, and the cost.

    python benchmarks/zoo_traces.py --results FILE [--sample N] [--seed S] [--match PATTERN]

Each model has one training step in mixed precision with AdamW on a simulated Ampere card. One
process on one core traces them all. FILE gets a line of JSON for each model as it ends, so a run
that was interrupted goes on where it stopped. If FILE has all models, the command only prints the
table. Seconds are the process's own. A model without a classifier gets one with 1000 classes.
"""

from __future__ import annotations

import argparse
import datetime as dt
import fnmatch
import gc
import hashlib
import itertools
import json
import os
import platform
import random
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

NUM_CLASSES = 1000
COMPUTE_CAPABILITY = (8, 0)
REPLAYED_BATCH_SIZE = 32
_EDGES = (0, 1500, 3000, 6000, 12000, 10**9)


def main() -> None:
    """Trace what is missing, print all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--results", type=Path, required=True, metavar="FILE")
    parser.add_argument("--sample", type=int, metavar="N", help="only so many models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--match", default="*", metavar="PATTERN", help="only such names")
    arguments = parser.parse_args()
    import timm
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = fnmatch.filter(timm.list_models(), arguments.match)
    if arguments.sample is not None and arguments.sample < len(names):
        names = random.Random(arguments.seed).sample(names, arguments.sample)  # noqa: S311 - a sample
    known = {row["model"]: row for row in _read(arguments.results)}
    with arguments.results.open("a") as file:
        for name in names:
            if name not in known:
                known[name] = traced(name)
                file.write(json.dumps(known[name]) + "\n")
                file.flush()
    report([known[name] for name in names])


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def traced(name: str) -> dict[str, Any]:
    """Trace a model.

    Args:
        name: Its name in timm.

    Returns:
        What it took, with a digest of its events, or the error.
    """
    import timm

    from memfit.backends.traces import trace
    from memfit.records import Precision, StepOptions
    from memfit.simulation.allocator.caching import CachingAllocator
    from memfit.simulation.tracing.trace import TraceOptions
    from memfit.simulation.tracing.workspace import Kernels
    from memfit.step.training_step import TrainingStep

    config = timm.models.get_pretrained_cfg(name)
    has_classes = config is None or config.num_classes > 0
    options = TraceOptions(
        compute_capability=COMPUTE_CAPABILITY,
        kernels=Kernels(compute_capability=COMPUTE_CAPABILITY),
    )
    gc.collect()
    start = time.process_time()
    try:
        step = TrainingStep(
            subject=name,
            options=StepOptions(
                precision=Precision.AMP_BF16,
                optimizer="adamw",
                num_classes=None if has_classes else NUM_CLASSES,
            ),
        )
        result = trace(step, options)
    except Exception as error:  # noqa: BLE001 - every failure is listed
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        return {"model": name, "error": reason}
    seconds = time.process_time() - start
    schedule = result.schedule
    start = time.process_time()
    num_iterations = len(list(schedule.play(CachingAllocator(), REPLAYED_BATCH_SIZE)))
    replay_seconds = (time.process_time() - start) / num_iterations
    stretches = [
        [
            (e.action.value, e.num_bytes, growth)
            for e, growth in zip(t.events, t.growth_bytes, strict=True)
        ]
        for t in (schedule.setup, schedule.first, schedule.later)
    ]
    return {
        "model": name,
        "seconds": round(seconds, 3),
        "replay_seconds": round(replay_seconds, 5),
        "num_operations": result.num_operations,
        "num_events": len(schedule.later.events),
        "digest": hashlib.sha256(json.dumps(stretches).encode()).hexdigest()[:16],
    }


def report(rows: list[dict[str, Any]]) -> None:
    """Print how many traced, each failure, and seconds by the number of events."""
    import timm
    import torch

    print(
        f"timm {timm.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} CPU cores, {dt.datetime.now(tz=dt.timezone.utc).date()}"
    )
    good = [row for row in rows if "error" not in row]
    print(f"{len(good)} of {len(rows)} models trace ({len(good) / len(rows):.1%})")
    for row in rows:
        if "error" in row:
            print(f"  {row['model']}: {row['error']}")
    if not good:
        return
    print(
        f"{'operations of a step':<24}{'models':>8}{'trace, s':>10}{'at most':>9}"
        f"{'us/operation':>14}{'replay, us/event':>18}"
    )
    for low, high in itertools.pairwise(_EDGES):
        part = [row for row in good if low <= row["num_operations"] < high]
        if not part:
            continue
        seconds = [row["seconds"] for row in part]
        each = statistics.median(row["seconds"] / row["num_operations"] * 1e6 for row in part)
        replay = statistics.median(row["replay_seconds"] / row["num_events"] * 1e6 for row in part)
        name = f"{low} to {high}" if high < _EDGES[-1] else f"{low} and more"
        print(
            f"{name:<24}{len(part):>8}{statistics.median(seconds):>10.2f}{max(seconds):>9.2f}"
            f"{each:>14.0f}{replay:>18.2f}"
        )
    total = sum(row["seconds"] for row in good)
    print(
        f"all: median {statistics.median(r['seconds'] for r in good):.2f} s, {total:.0f} s in total"
    )


if __name__ == "__main__":
    main()
