"""How many runs does the search for a script's batch size take, and what does it recommend?

    python benchmarks/script_trials.py [SCRIPT ...] [--gpu GPU ...] [--memory SIZE]

By default the script is `examples/rehearse/plain_pytorch.py`. Each is searched for on each
rehearsed card.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import statistics
import sys
from pathlib import Path

import torch

from memfit.cards import find_gpu
from memfit.rehearsal.activate import rehearsed_environment
from memfit.rehearsal.scripts import ScriptSearch, probe_command
from memfit.units import parse_bytes

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "rehearse"
SCRIPTS = (EXAMPLES / "plain_pytorch.py",)


def main() -> None:
    """Print a row for each search."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", type=Path, metavar="SCRIPT", default=SCRIPTS)
    parser.add_argument("--gpu", nargs="+", default=["rtx3060", "rtx4090"])
    parser.add_argument("--memory", type=parse_bytes, metavar="SIZE", help="of each card")
    arguments = parser.parse_args()
    today = dt.datetime.now(tz=dt.timezone.utc).date()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {today}.\n")
    print("| script | card | runs | seconds | largest | recommended | free |")
    print("|---|---|--:|--:|--:|--:|--:|")
    counts = []
    for script in arguments.scripts:
        for name in arguments.gpu:
            card = find_gpu(name, total_bytes=arguments.memory)
            bounds = ScriptSearch(gpu=card, environment=rehearsed_environment(card))
            found = probe_command((sys.executable, str(script), "--batch-size", "{}"), bounds)
            counts.append(len(found.trials))
            stand = found.recommended_batch_size
            trial = None if stand is None else found.trial_at(stand)
            reserved = 0 if trial is None else trial.peak_reserved_bytes or 0
            print(
                f"| {script.stem} | {card.name} | {len(found.trials)} | {found.seconds:.0f} "
                f"| {found.max_batch_size} | {stand} "
                f"| {1 - reserved / found.capacity.safe_bytes:.1%} |",
                flush=True,
            )
    print(f"\nIn the median {statistics.median(counts)} runs, at most {max(counts)}.")


if __name__ == "__main__":
    main()
