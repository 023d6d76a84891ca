"""Compare training scripts on a real GPU with the same scripts rehearsed on that card.

    python benchmarks/script_truth.py [--json FILE] [SCRIPT ...]

By default the scripts are those of `examples/rehearse/` whose libraries are installed. Each runs to
its end on the GPU with the watch that `memfit rehearse` uses, and then rehearsed. Without a GPU,
`--against-itself GPU` rehearses both times.
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from rehearsal_truth import card_here

from memfit.rehearsal.activate import rehearsed_environment
from memfit.rehearsal.children import Output
from memfit.rehearsal.run import rehearse_command

MIB = 2**20
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "rehearse"
NEEDS = {
    "fastai_learner": "fastai",
    "lightning_trainer": "pytorch_lightning",
    "transformers_trainer": "transformers",
}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1")
RUNNERS = {"ddp": TORCHRUN, "fsdp2": TORCHRUN}
FIGURES = ("requested_bytes", "allocated_bytes", "reserved_bytes")


def main() -> None:
    """Run each script twice, and print both peaks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scripts", nargs="*", type=Path, metavar="SCRIPT")
    parser.add_argument("--against-itself", metavar="GPU", help="rehearse both times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures here")
    arguments = parser.parse_args()
    card, is_real = card_here(arguments.against_itself)
    import torch

    how = "real and rehearsed" if is_real else "rehearsed twice (there was no GPU)"
    today = dt.datetime.now(tz=dt.timezone.utc).date()
    print(f"{card.name}, {how}; torch {torch.__version__}, {today}.\n")
    print("| script | requested, MiB | differs, bytes | reserved, MiB | differs, MiB |")
    print("|---|---|---|---|---|")
    rows = []
    for script in arguments.scripts or _examples():
        real = _peak(script, None if is_real else card)
        rehearsed = _peak(script, card)
        rows.append({"script": script.name, "real": real, "rehearsed": rehearsed})
        if real is None or rehearsed is None:
            print(f"| {script.stem} | failed: real {real}, rehearsed {rehearsed} | | | |")
            continue
        requested, reserved = (rehearsed[name] - real[name] for name in (FIGURES[0], FIGURES[2]))
        print(
            f"| {script.stem} | {real['requested_bytes'] / MIB:.1f} | {requested} "
            f"| {real['reserved_bytes'] / MIB:.0f} | {reserved / MIB:.0f} |",
            flush=True,
        )
    if arguments.json is not None:
        kept = {"card": card.name, "torch": torch.__version__, "date": str(today), "rows": rows}
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")


def _examples() -> list[Path]:
    return [
        script
        for script in sorted(EXAMPLES.glob("*.py"))
        if importlib.util.find_spec(NEEDS.get(script.stem, "torch")) is not None
    ]


def _peak(script: Path, card: Any) -> dict[str, int] | None:
    """Run a script to its end, and return the peak of its process; `None` where it failed."""
    environment = {} if card is None else rehearsed_environment(card, environment=os.environ)
    command = (*RUNNERS.get(script.stem, (sys.executable,)), str(script))
    found = rehearse_command(command, card, environment, is_whole=True, output=Output.KEPT)
    peak = found.rehearsal.peak
    if found.rehearsal.exit_code or peak is None:
        print(found.last_words[-2000:], file=sys.stderr)
        return None
    return {name: getattr(peak, name) for name in FIGURES}


if __name__ == "__main__":
    main()
