"""Compare the peaks of real training steps with rehearsed ones of the same card, in one command.

On a machine with a GPU, each side runs in a process of its own: one on the GPU, one rehearsed as
that card. Requested bytes have to agree to the byte, and reserved bytes to a segment. A row is
printed when both sides have it. In the end, the rows that differ are run again and listed by
operator. Without a GPU, `--against-itself` rehearses both sides. That checks that the rehearsal
repeats:

    python benchmarks/rehearsal_truth.py
    python benchmarks/rehearsal_truth.py --against-itself "RTX 3090"
    python benchmarks/rehearsal_truth.py --against benchmarks/data/h100-peaks.json

`--against` compares a rehearsal with peaks that were taken on a real card before, which needs the
same torch. On an H100 with 16 cores, three such runs of four models each, side by side, took under
four minutes. It takes no more than 20 GiB of the card.
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
from collections.abc import Iterator
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
SHOWN_ROWS = 6

_Row = dict[str, Any]


def main() -> None:
    """Run both sides, and print where they differ."""
    arguments = _arguments()
    if arguments.side:
        _run_side(arguments.models, arguments.by_operator)
        return
    if arguments.against is not None:
        _compare_with_kept(arguments.against, arguments.models)
        return
    card, is_real = card_here(arguments.against_itself)
    from memfit.rehearsal.activate import rehearsed_environment

    rehearsed = {**os.environ, **rehearsed_environment(card, environment=os.environ)}
    sides = (dict(os.environ) if is_real else rehearsed, rehearsed)
    _print_header(card.name, is_real=is_real)
    pairs = []
    for pair in _run_sides(sides, arguments.models):
        _print_row(*pair)
        pairs.append(pair)
    failed = [pair[0] for pair in pairs if _differs(*pair)]
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(_kept(pairs, card.name), indent=1))
    _print_summary(pairs)
    if failed:
        _print_operators(sides, failed[:SHOWN_ROWS])
    sys.exit(1 if failed else 0)


def _compare_with_kept(path: Path, models: list[str]) -> None:
    """Rehearse the rows of a file of real peaks, and print where they differ."""
    import torch

    from memfit.cards import find_gpu
    from memfit.rehearsal.activate import rehearsed_environment

    kept = json.loads(path.read_text(encoding="utf-8"))
    if torch.__version__ != kept["torch"]:
        print(f"The peaks are of torch {kept['torch']}; this is {torch.__version__}.")
    card = find_gpu(kept["card"], total_bytes=kept["total_bytes"])
    rehearsed = {**os.environ, **rehearsed_environment(card, environment=os.environ)}
    _print_header(f"{card.name}, real on {kept['date']}", is_real=True)
    real = {_key_of(row): row for row in kept["real"]}
    pairs = []
    # Models that shared a process on the card share one here, because the driver's addresses depend
    # on what was there before.
    for together in kept["processes"]:
        for (row,) in _run_sides((rehearsed,), [name for name in together if name in models]):
            if _key_of(row) in real:
                pairs.append((real[_key_of(row)], row))
                _print_row(*pairs[-1])
    _print_summary(pairs)


def _key_of(row: _Row) -> tuple[Any, ...]:
    return row["model"], row["setting"], row["batch_size"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against-itself", metavar="GPU", help="rehearse both sides as this card")
    parser.add_argument("--against", type=Path, metavar="FILE", help="real peaks, taken before")
    parser.add_argument("--models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--output", type=Path, metavar="FILE", help="keep the figures as JSON")
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--by-operator", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def card_here(named: str | None) -> tuple[Any, bool]:
    """Return the card to rehearse, and whether it is the real one of this machine.

    Args:
        named: A card to rehearse where there is no GPU.
    """
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
    sides: tuple[dict[str, str], ...], models: list[str], *options: str
) -> Iterator[tuple[_Row, ...]]:
    """Run all sides at once, and yield each row when all have it."""
    running = [
        subprocess.Popen(
            [sys.executable, __file__, "--side", "--models", *models, *options],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for environment in sides
    ]
    try:
        outputs = [process.stdout for process in running if process.stdout is not None]
        for lines in zip(*outputs, strict=False):
            yield tuple(map(json.loads, lines))
        if any(process.wait() for process in running):
            sys.exit("One side failed; its error is above.")
    finally:
        for process in running:
            process.kill()
            process.wait()


# --- one side -----------------------------------------------------------------------------------


def _run_side(models: list[str], by_operator: list[list[Any]] | None) -> None:
    """Write a line of JSON for each row; what else is printed goes to standard error."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for model in models:
        settings = (*SETTINGS, *((COMPILED_SETTING,) if model in COMPILED else ()))
        for setting in settings:
            sizes = _sizes_of(model, setting, by_operator)
            for row in _run_setting(model, setting, sizes, is_by_operator=by_operator is not None):
                print(json.dumps(row), file=lines, flush=True)


def _sizes_of(
    model: str, setting: dict[str, Any], by_operator: list[list[Any]] | None
) -> tuple[int, ...]:
    """Return the batch sizes to run: all, or those of the rows that are listed by operator."""
    if by_operator is None:
        return BATCH_SIZES
    return tuple(size for size in BATCH_SIZES if [model, _text(setting), size] in by_operator)


def _text(setting: dict[str, Any]) -> str:
    return " ".join(name if value is True else str(value) for name, value in setting.items())


def _run_setting(
    model: str, setting: dict[str, Any], batch_sizes: tuple[int, ...], *, is_by_operator: bool
) -> Iterator[_Row]:
    if not batch_sizes:
        return
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
    for batch_size in batch_sizes:
        release(device)
        torch.cuda.reset_peak_memory_stats(device)
        prepared.begin()
        for _ in range(NUM_ITERATIONS):
            prepared.iterate(batch_size)
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats(device)
        operators = _bytes_by_operator(prepared, batch_size) if is_by_operator else []
        prepared.end()
        yield {
            "model": model,
            "setting": _text(setting),
            "batch_size": batch_size,
            "requested_bytes": stats["requested_bytes.all.peak"],
            "allocated_bytes": stats["allocated_bytes.all.peak"],
            "reserved_bytes": stats["reserved_bytes.all.peak"],
            "num_alloc_retries": stats["num_alloc_retries"],
            "operators": operators,
        }
    del prepared
    torch.compiler.reset()
    release(device)


def _bytes_by_operator(prepared: Any, batch_size: int) -> list[tuple[str, int]]:
    """Return what each operator of one more iteration asked for, in their order."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    asked: list[tuple[str, int]] = []

    def requested() -> int:
        return int(torch.cuda.memory_stats_as_nested_dict()["requested_bytes"]["all"]["allocated"])

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            before = requested()
            returned = func(*args, **(kwargs or {}))
            after = requested()
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


def _print_row(real: _Row, rehearsed: _Row) -> None:
    requested = rehearsed["requested_bytes"] - real["requested_bytes"]
    reserved = rehearsed["reserved_bytes"] - real["reserved_bytes"]
    print(
        f"| {real['model']} | {real['setting']} | {real['batch_size']} "
        f"| {real['requested_bytes'] / 2**20:.1f} | {requested} "
        f"| {real['reserved_bytes'] / 2**20:.0f} | {reserved / 2**20:.0f} MiB |",
        flush=True,
    )


def _print_summary(pairs: list[tuple[_Row, ...]]) -> None:
    """Print how far the two sides are apart, over all rows."""
    num_differing = sum(_differs(*pair) for pair in pairs)
    print(f"\n{num_differing} of {len(pairs)} rows differ.", flush=True)
    for name in ("requested_bytes", "allocated_bytes", "reserved_bytes"):
        apart = sorted(abs(ours[name] / real[name] - 1) for real, ours in pairs)
        if apart:
            print(
                f"{name.partition('_')[0]}: median {apart[len(apart) // 2]:.2%}, p90 "
                f"{apart[int(0.9 * (len(apart) - 1))]:.2%}, worst {apart[-1]:.2%}"
            )


def _differs(real: _Row, rehearsed: _Row) -> bool:
    reserved = rehearsed["reserved_bytes"] - real["reserved_bytes"]
    return real["requested_bytes"] != rehearsed["requested_bytes"] or abs(reserved) > SEGMENT_BYTES


def _print_operators(sides: tuple[dict[str, str], dict[str, str]], failed: list[_Row]) -> None:
    """Run the rows that differ again, and print by operator where they do."""
    keys = [[row["model"], row["setting"], row["batch_size"]] for row in failed]
    models = list(dict.fromkeys(row["model"] for row in failed))
    for one, other in _run_sides(sides, models, "--by-operator", json.dumps(keys)):
        print(f"\n{one['model']}, {one['setting']}, batch {one['batch_size']}:")
        for line in _differences(one["operators"], other["operators"])[:SHOWN_OPERATORS]:
            print(f"  {line}")


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


def _kept(pairs: list[tuple[_Row, ...]], card: str) -> dict[str, Any]:
    import torch

    return {
        "card": card,
        "torch": torch.__version__,
        "date": f"{dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}",
        "real": [real for real, _ in pairs],
        "rehearsed": [rehearsed for _, rehearsed in pairs],
    }


if __name__ == "__main__":
    main()
