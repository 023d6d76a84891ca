"""Compare the peaks of real training steps with rehearsed ones of the same card, in one command.

On a machine with a GPU, each side runs in a process of its own: one on the GPU, one rehearsed as
that card. Requested bytes have to agree to the byte, and reserved bytes to a segment. Differences
are listed by operator. Without a GPU, `--against-itself` rehearses both sides. That checks that the
rehearsal repeats:

    python benchmarks/rehearsal_truth.py
    python benchmarks/rehearsal_truth.py --against-itself "RTX 3090"

It takes under five minutes on a data centre's card, and no more than 20 GiB of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

MODELS = (
    "resnet50",
    "resnetv2_50",
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "convnext_tiny",
    "regnety_032",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "deit3_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "maxvit_tiny_tf_224",
    "mixer_b16_224",
)
SETTINGS = (
    {"precision": "fp32", "optimizer": "adamw"},
    {"precision": "amp-bf16", "optimizer": "adamw"},
    {"precision": "amp-bf16", "optimizer": "momentum", "channels_last": True},
)
COMPILED = ("resnet50", "vit_small_patch16_224")
COMPILED_SETTING = {"precision": "amp-bf16", "optimizer": "adamw", "compiled": True}
BATCH_SIZES = (4, 16, 32)
SEGMENT_BYTES = 2 * 1024**2  # the caching allocator takes memory from CUDA in multiples of this
NUM_ITERATIONS = 3
SHOWN_OPERATORS = 5


def main() -> None:
    """Run both sides, and print where they differ."""
    arguments = _arguments()
    if arguments.side is not None:
        _run_side(arguments.side, arguments.models)
        return
    card, is_real = _card(arguments.against_itself)
    from memfit.rehearsal.activate import rehearsed_environment

    rehearsed = {**os.environ, **rehearsed_environment(card, environment=os.environ)}
    sides = {"real": dict(os.environ) if is_real else rehearsed, "rehearsed": rehearsed}
    results = _run_sides(sides, arguments)
    _print_header(card.name, is_real=is_real)
    failed = _print_table(results["real"], results["rehearsed"])
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(_kept(results, card.name), indent=1))
    print(f"\n{failed} of {len(results['real'])} rows differ.")
    sys.exit(1 if failed else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against-itself", metavar="GPU", help="rehearse both sides as this card")
    parser.add_argument("--models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the figures as JSON")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _card(named: str | None) -> tuple[Any, bool]:
    """Return the card to rehearse, and whether it is the real one of this machine."""
    from memfit.cards import find_gpu, gpu_like

    if named is not None:
        return find_gpu(named), False
    asked = (
        "import torch; p = torch.cuda.get_device_properties(0); "
        "print(p.name, p.total_memory, p.major, p.minor, p.multi_processor_count, sep=';')"
    )
    found = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=False
    )
    if found.returncode:
        sys.exit("There is no GPU here. Give --against-itself GPU to rehearse both sides.")
    name, total, major, minor, multiprocessors = found.stdout.strip().split(";")
    card = gpu_like(name, total_bytes=int(total))
    return dataclasses.replace(
        card, architecture=f"{major}.{minor}", multiprocessors=int(multiprocessors)
    ), True


def _run_sides(
    sides: dict[str, dict[str, str]], arguments: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    files = {name: Path(f"rehearsal-truth-{name}-{os.getpid()}.json") for name in sides}
    try:
        running = [
            subprocess.Popen(
                [sys.executable, __file__, "--side", files[name], "--models", *arguments.models],
                env=environment,
            )
            for name, environment in sides.items()
        ]
        if any(process.wait() for process in running):
            sys.exit("One side failed; its error is above.")
        return {name: json.loads(file.read_text()) for name, file in files.items()}
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)


# --- one side -----------------------------------------------------------------------------------


def _run_side(output: Path, models: list[str]) -> None:
    rows = []
    for model in models:
        settings = (*SETTINGS, *((COMPILED_SETTING,) if model in COMPILED else ()))
        for setting in settings:
            rows += _run_setting(model, dict(setting))
    output.write_text(json.dumps(rows))


def _run_setting(model: str, setting: dict[str, Any]) -> list[dict[str, Any]]:
    import torch

    from memfit.memory.release import release
    from memfit.records import Precision, StepOptions
    from memfit.step.training_step import TrainingStep

    options = dict(setting)
    is_compiled = options.pop("compiled", False)
    options["precision"] = Precision(options["precision"])
    device = torch.device("cuda")
    torch.manual_seed(0)
    prepared = TrainingStep(subject=model, options=StepOptions(**options)).prepare(device)
    if is_compiled:
        prepared.model = torch.compile(prepared.model)
    rows = []
    for batch_size in BATCH_SIZES:
        release(device)
        torch.cuda.reset_peak_memory_stats(device)
        prepared.begin()
        for _ in range(NUM_ITERATIONS):
            prepared.iterate(batch_size)
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats(device)
        operators = [] if is_compiled else _bytes_by_operator(prepared, batch_size)
        prepared.end()
        rows.append(
            {
                "model": model,
                "setting": " ".join(str(value) for value in setting.values()),
                "batch_size": batch_size,
                "requested_bytes": stats["requested_bytes.all.peak"],
                "allocated_bytes": stats["allocated_bytes.all.peak"],
                "reserved_bytes": stats["reserved_bytes.all.peak"],
                "num_alloc_retries": stats["num_alloc_retries"],
                "operators": operators,
            }
        )
    del prepared
    torch.compiler.reset()
    release(device)
    return rows


def _bytes_by_operator(prepared: Any, batch_size: int) -> list[tuple[str, int]]:
    """Return what each operator of one more iteration asked for, in their order."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    asked: list[tuple[str, int]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            before = torch.cuda.memory_stats()["requested_bytes.all.allocated"]
            returned = func(*args, **(kwargs or {}))
            after = torch.cuda.memory_stats()["requested_bytes.all.allocated"]
            if after > before:
                asked.append((str(func), after - before))
            return returned

    with Watch():
        prepared.iterate(batch_size)
    return asked


# --- the comparison -----------------------------------------------------------------------------


def _print_header(card: str, *, is_real: bool) -> None:
    import timm
    import torch

    how = "real and rehearsed" if is_real else "rehearsed twice (there was no GPU)"
    print(
        f"{card}, {how}; {platform.machine()}, torch {torch.__version__}, "
        f"cuDNN {torch.backends.cudnn.version()}, timm {timm.__version__}, "
        f"{dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}.\n"
    )
    print("| model | setting | batch | requested, MiB | differs, bytes | reserved, MiB | differs |")
    print("|---|---|---|---|---|---|---|")


def _print_table(real: list[dict[str, Any]], rehearsed: list[dict[str, Any]]) -> int:
    """Print a row for each step, and return how many differ."""
    failed = []
    for one, other in zip(real, rehearsed, strict=True):
        requested = other["requested_bytes"] - one["requested_bytes"]
        reserved = other["reserved_bytes"] - one["reserved_bytes"]
        print(
            f"| {one['model']} | {one['setting']} | {one['batch_size']} "
            f"| {one['requested_bytes'] / 2**20:.1f} | {requested} "
            f"| {one['reserved_bytes'] / 2**20:.0f} | {reserved / 2**20:.0f} MiB |"
        )
        if requested or abs(reserved) > SEGMENT_BYTES:
            failed.append((one, other))
    for one, other in failed:
        print(f"\n{one['model']}, {one['setting']}, batch {one['batch_size']}:")
        for line in _differences(one["operators"], other["operators"])[:SHOWN_OPERATORS]:
            print(f"  {line}")
    return len(failed)


def _differences(real: list[list[Any]], rehearsed: list[list[Any]]) -> list[str]:
    """Return the operators whose bytes differ, those that differ most first."""
    real_bytes, rehearsed_bytes = Counter[str](), Counter[str]()
    for counter, asked in ((real_bytes, real), (rehearsed_bytes, rehearsed)):
        for name, num_bytes in asked:
            counter[name] += num_bytes
    names = real_bytes | rehearsed_bytes
    by_difference = sorted(names, key=lambda n: -abs(rehearsed_bytes[n] - real_bytes[n]))
    return [
        f"{name}: {real_bytes[name]} bytes asked for, rehearsed {rehearsed_bytes[name]}"
        for name in by_difference
        if real_bytes[name] != rehearsed_bytes[name]
    ] or ["every operator asked for the same: the order of blocks differs"]


def _kept(results: dict[str, list[dict[str, Any]]], card: str) -> dict[str, Any]:
    import torch

    rows = {
        side: [{key: value for key, value in row.items() if key != "operators"} for row in found]
        for side, found in results.items()
    }
    return {
        "card": card,
        "torch": torch.__version__,
        "date": f"{dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}",
        **rows,
    }


if __name__ == "__main__":
    main()
