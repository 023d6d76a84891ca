"""Sweep all of timm over twelve cards, and print what it costs.

    python benchmarks/zoo.py --journal FILE [--csv FILE] [--html FILE] [--sample N] [--seed S]

Each model has one training step in amp-bf16 with AdamW and 1000 classes, simulated for the dozen
common cards. An interrupted run goes on where it stopped, and its files are those of a run without
interruption. With --sample, only so many models are tried, and the minutes for all are projected.
"""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import os
import platform
import random
import time
from pathlib import Path

import psutil
import timm
import torch

import memfit
from memfit.reports.sweep import sweep_rows
from memfit.reports.sweep_page import page
from memfit.units import format_bytes


def main() -> None:
    """Sweep, write the files, print the rate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--journal", type=Path, required=True, metavar="FILE")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--html", type=Path, metavar="FILE")
    parser.add_argument("--sample", type=int, metavar="N", help="only so many models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, metavar="N", help="processes at a time")
    arguments = parser.parse_args()
    names = timm.list_models()
    num_all = len(names)
    if arguments.sample is not None:
        names = random.Random(arguments.seed).sample(names, arguments.sample)  # noqa: S311 - a sample
    most_bytes = num_asked = 0
    # Of each process, those that have ended too.
    cpu_seconds: dict[int, float] = {}

    def watch(_what: str, done: int, total: int) -> None:
        nonlocal most_bytes, num_asked
        num_asked = num_asked or total - done
        here = psutil.Process()
        held = 0
        for process in (here, *here.children(recursive=True)):
            held += process.memory_info().rss
            used = process.cpu_times()
            cpu_seconds[process.pid] = used.user + used.system
        most_bytes = max(most_bytes, held)

    start, idle = time.perf_counter(), psutil.cpu_times().idle
    found = memfit.sweep(
        names,
        precisions=["amp-bf16"],
        num_classes=1000,
        quick=True,
        workers=arguments.workers,
        journal=arguments.journal,
        progress=watch,
    )
    seconds = time.perf_counter() - start
    share_idle = (psutil.cpu_times().idle - idle) / seconds / (os.cpu_count() or 1)
    if arguments.csv is not None:
        with arguments.csv.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(sweep_rows(found.rows))
    if arguments.html is not None:
        arguments.html.write_text(page(found), encoding="utf-8")
    failed = {row.model: row.reason for row in found.rows if row.num_parameters is None}
    print(
        f"memfit {memfit.__version__}, timm {timm.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {os.cpu_count()} CPU cores (idle {share_idle:.0%}, load "
        f"{os.getloadavg()[0]:.1f}), {dt.datetime.now(tz=dt.timezone.utc).date()}"
    )
    num_done = len({row.model for row in found.rows})
    if not found.is_complete:
        print(
            f"Interrupted: {num_done} of {len(names)} models are done; in {seconds:.0f} s, with "
            f"{sum(cpu_seconds.values()):.0f} CPU s and at most {format_bytes(most_bytes)}"
        )
        return
    print(
        f"{len(names) - len(failed)} of {len(names)} models on {len(found.gpus)} cards; "
        f"{num_asked} were not in the journal: {seconds:.0f} s, at most {format_bytes(most_bytes)} "
        "in all processes"
    )
    if num_asked:
        each = seconds / num_asked
        print(f"{each:.2f} s a model, so {each * num_all / 60:.0f} minutes for all {num_all}")
        each = sum(cpu_seconds.values()) / num_asked
        print(
            f"{each:.2f} CPU s a model, so {each * num_all / 60 / 2:.0f} minutes for all {num_all} "
            "on two cores that do nothing else"
        )
    for model, reason in failed.items():
        print(f"  {model}: {reason}")


if __name__ == "__main__":
    main()
