"""Compare the simulation with a real GPU: one command, under eight minutes.

    python benchmarks/gpu_truth.py [--minutes 8] [--record tests/data] [--json FILE]

For a dozen timm models, in fp32, amp-bf16 and channels-last, under caps of 8, 24 and 80 GiB: the
real search, its prediction, peaks at three batch sizes, trials and seconds. With `--record`, it
keeps allocator histories of three steps as fixtures. Their replay must take the same segments.
Prints the versions that it ran with. Stops in time, and says what it left out.
"""

from __future__ import annotations

import argparse
import datetime as dt
import gzip
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memfit.records import Event

MODELS = (
    "resnet50",
    "vit_base_patch16_224",
    "convnext_tiny",
    "efficientnet_b0",
    "swin_tiny_patch4_window7_224",
    "mobilenetv3_large_100",
    "regnety_032",
    "densenet121",
    "mixer_b16_224",
    "nfnet_f0",
    "deit3_small_patch16_224",
    "vgg16",
)
SETTINGS = (("fp32", False), ("amp-bf16", False), ("amp-bf16", True))
CAPS_GIB = (8, 24, 80)
RECORDED = ("test_vit", "test_resnet", "test_convnext")
LARGEST_FIXTURE_BYTES = 300_000
NUM_PEAKS = 3


def main() -> None:
    """Search, compare, record, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="write histories here")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--history", nargs=2, metavar=("MODEL", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.history:
        record(arguments.history[0], Path(arguments.history[1]))
        return
    import timm
    import torch

    if not torch.cuda.is_available():
        sys.exit("This needs a CUDA device, and torch sees none.")
    end = time.monotonic() + 60 * arguments.minutes
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, timm {timm.__version__}, "
        f"{dt.datetime.now(dt.timezone.utc).date()}"
    )
    if arguments.record is not None:
        for model in RECORDED:
            # This needs a new process, so that the history starts with an empty allocator.
            path = arguments.record / f"history-{model}.json.gz"
            subprocess.run([sys.executable, __file__, "--history", model, str(path)], check=True)
    rows = compare(end)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))


def compare(end: float) -> list[dict[str, Any]]:
    """Run real searches as long as time is left.

    Args:
        end: When to stop, by `time.monotonic`.

    Returns:
        A row for each search.
    """
    import torch

    import memfit

    total_bytes = torch.cuda.get_device_properties(0).total_memory
    rows: list[dict[str, Any]] = []
    left_out = 0
    # Each model runs once before any runs twice; the setting and the cap change with each model.
    for turn, (index, model) in itertools.product(range(9), enumerate(MODELS)):
        setting, cap = divmod((turn + index) % 9, 3)
        precision, channels_last = SETTINGS[setting]
        cap_gib = CAPS_GIB[cap]
        if time.monotonic() > end or cap_gib * 2**30 > 0.95 * total_bytes:
            left_out += 1
            continue
        result = memfit.probe(
            model,
            device="cuda",
            memory=f"{cap_gib}GiB",
            precision=precision,
            channels_last=channels_last,
        )
        row = _row(result, cap_gib)
        rows.append(row)
        print(
            f"{model:<30}{precision:<9}{'nhwc' if channels_last else 'nchw':<5}{cap_gib:>3} GiB  "
            f"real {row['real']:>5}  predicted {row['predicted'] or '-':>5}  "
            f"trials {row['trials']:>2}  {row['seconds']:>5.1f} s  peaks {row['peaks']}"
        )
    print(f"{len(rows)} searches; {left_out} left out for want of time or memory")
    return rows


def _row(result: Any, cap_gib: int) -> dict[str, Any]:
    predictions = {trial.batch_size: trial for trial in result.predictions}
    peaks = [
        (
            trial.batch_size,
            trial.peak_reserved_bytes,
            predictions[trial.batch_size].peak_reserved_bytes,
        )
        for trial in result.trials
        if trial.fits and trial.batch_size in predictions
    ][:NUM_PEAKS]
    fitting = [trial.batch_size for trial in result.predictions if trial.fits]
    return {
        "model": result.subject,
        "precision": result.options.precision.value,
        "channels_last": result.options.channels_last,
        "cap_gib": cap_gib,
        "real": result.max_batch_size,
        "predicted": max(fitting, default=None),
        "trials": len(result.trials),
        "seconds": result.seconds,
        "peaks": [f"{size}: {ours / real - 1:+.1%}" for size, real, ours in peaks],
    }


def record(model: str, path: Path) -> None:
    """Record the history of three iterations, check its replay, and keep it.

    Args:
        model: A timm model.
        path: Where to.
    """
    import torch

    from memfit._torch_private import allocator_snapshot, recorded_history
    from memfit.records import Precision, StepOptions
    from memfit.simulation.history import disagreement, events_of, read_history
    from memfit.step.training_step import TrainingStep

    step = TrainingStep(
        subject=model, options=StepOptions(precision=Precision.AMP_BF16, optimizer="adamw")
    )
    with recorded_history(max_entries=1_000_000):
        prepared = step.prepare(torch.device("cuda"))
        for _ in range(3):
            prepared.iterate(16)
        entries = allocator_snapshot()["device_traces"][0]
    events = events_of(read_history(entries))
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(events, path)
    found = disagreement(events)
    print(f"{model}: {len(events)} events, {path.stat().st_size} bytes; ", end="")
    print("the replay agrees" if found is None else f"the replay differs: {found}")
    if path.stat().st_size > LARGEST_FIXTURE_BYTES:
        path.unlink()
        sys.exit(f"{path.name} is over {LARGEST_FIXTURE_BYTES} bytes.")


def _save(events: Iterable[Event], path: Path) -> None:
    """Write events to a small compressed file; addresses become small numbers."""
    numbers: dict[int, int] = {}
    rows = [
        [event.action.value, numbers.setdefault(event.id, len(numbers)), event.num_bytes]
        for event in events
    ]
    path.write_bytes(gzip.compress(json.dumps(rows, separators=(",", ":")).encode(), mtime=0))


if __name__ == "__main__":
    main()
