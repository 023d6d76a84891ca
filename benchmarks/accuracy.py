"""How right the simulation is, against published measurements of two real GPUs.

    python benchmarks/accuracy.py --data FOLDER [--sample N] [--seed S] [--jobs J] [--json FILE]
                                  [--rows FILE]

FOLDER has `timm-train-rtx3090.csv` (which rung of a ladder of batch sizes fitted) and
`timm-train-a100-40gb.csv` (peak memory of a process). docs/accuracy.md says where they come from
and how to read the output. Nothing is downloaded. With --rows, a line of JSON is written for each
row as soon as it is known. A run that was interrupted then goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import multiprocessing
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

LADDER = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
MIB = 2**20

# torch 1.12 on the driver of the time. CUDA 11 before 11.7 loads every kernel when the context is
# made: 1687 MiB were measured on this card with CUDA 11.1 (pytorch/pytorch#55277).
RTX_3090_TOTAL_MIB = 24268
RTX_3090_CONTEXT_MIB = 1687
# :4096:2:16:8 came later; torch 1.12's workspaces are 4 MiB (pytorch/pytorch#86167).
RTX_3090_BLAS_BYTES = 4 * MIB
A100_BLAS_BYTES = 8_519_680
# The heads of old models: today some of these names have no classes in their configuration.
NUM_CLASSES = 1000
_CHANGED_SHARE = 0.08
_JUMP_SHARE = 1.5


@dataclasses.dataclass(frozen=True)
class Task:
    """One model in one setting, with all of its rows."""

    kind: str
    model: str
    memory_format: str
    image_size: int | None
    rows: tuple[dict[str, str], ...]


def main() -> None:
    """Trace, replay, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--sample", type=int, metavar="N", help="only so many models of each table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write summary and rows here")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="keep rows here and go on")
    arguments = parser.parse_args()
    start = time.perf_counter()
    tasks = _sampled(
        [*_ladder_tasks(arguments.data), *_peak_tasks(arguments.data)],
        arguments.sample,
        arguments.seed,
    )
    rows = _rows(tasks, arguments.rows, arguments.jobs)
    ladder = [row for row in rows if row["kind"] == "ladder"]
    peaks = [row for row in rows if row["kind"] == "peak"]
    summary = {"ladder": report_ladder(ladder), "peak": report_peaks(peaks)}
    print(f"\n{len(tasks)} traces in {time.perf_counter() - start:.0f} s")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1))


def _rows(tasks: list[Task], kept: Path | None, jobs: int) -> list[dict[str, Any]]:
    """Run the tasks whose rows are not known yet."""
    if kept is None:
        return [row for rows in _mapped(_run, tasks, jobs) for row in rows]
    known: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    if kept.exists():
        for row in map(json.loads, kept.read_text().splitlines()):
            known.setdefault(_key(row["kind"], row), []).append(row)
    missing = [task for task in tasks if _key(task.kind, task.rows[0]) not in known]
    with kept.open("a") as file:
        for task, rows in zip(missing, _mapped(_run, missing, jobs), strict=True):
            known[_key(task.kind, task.rows[0])] = rows
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
    return [row for task in tasks for row in known[_key(task.kind, task.rows[0])]]


def _key(kind: str, row: dict[str, Any]) -> tuple[str, str, str]:
    return kind, row["model"], row.get("memory_format", "")


def _ladder_tasks(folder: Path) -> list[Task]:
    rows = _read(folder / "timm-train-rtx3090.csv")
    return [
        Task("ladder", row["model"], row["memory_format"], int(row["image_size"]), (row,))
        for row in rows
    ]


def _peak_tasks(folder: Path) -> list[Task]:
    by_model: dict[str, list[dict[str, str]]] = {}
    for row in _read(folder / "timm-train-a100-40gb.csv"):
        by_model.setdefault(row["model"], []).append(row)
    return [Task("peak", name, "nchw", None, tuple(rows)) for name, rows in by_model.items()]


def _read(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        sys.exit(f"There is no {path.name} in {path.parent}: give --data the folder of the tables.")


def _sampled(tasks: list[Task], num_models: int | None, seed: int) -> list[Task]:
    if num_models is None:
        return tasks
    chosen = []
    for kind in ("ladder", "peak"):
        models = sorted({task.model for task in tasks if task.kind == kind})
        kept = set(random.Random(seed).sample(models, min(num_models, len(models))))  # noqa: S311 - a sample
        chosen += [task for task in tasks if task.kind == kind and task.model in kept]
    return chosen


def _mapped(
    function: Callable[[Task], list[dict[str, Any]]], tasks: Sequence[Task], jobs: int
) -> Iterable[list[dict[str, Any]]]:
    if jobs == 1:
        yield from map(function, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(function, tasks)


def _run(task: Task) -> list[dict[str, Any]]:
    warnings.simplefilter("ignore")
    try:
        return _ladder_rows(task) if task.kind == "ladder" else _peak_rows(task)
    except Exception as error:  # noqa: BLE001 - every row is shown, this one with its reason
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        return [{"kind": task.kind, **row, "error": reason} for row in task.rows]


def _trace(task: Task) -> Any:
    import timm
    import torch

    from memfit.backends.simulated import trace
    from memfit.records import Precision, StepOptions
    from memfit.simulation.tracing.autocast import FP32
    from memfit.simulation.tracing.semantics import MetaPrecision
    from memfit.simulation.tracing.trace import TraceOptions
    from memfit.simulation.tracing.workspace import Kernels
    from memfit.step.training_step import TrainingStep

    torch.set_num_threads(1)
    config = timm.models.get_pretrained_cfg(task.model)
    is_ladder = task.kind == "ladder"
    capability = (8, 6) if is_ladder else (8, 0)
    size = task.image_size
    step = TrainingStep(
        subject=task.model,
        options=StepOptions(
            precision=Precision.AMP_FP16 if is_ladder else Precision.FP32,
            optimizer="sgd",
            channels_last=task.memory_format == "nhwc",
            image_size=None if size is None else (size, size),
            num_classes=NUM_CLASSES if config is not None and config.num_classes == 0 else None,
        ),
    )
    # Torch of those days kept the BLAS workspaces that `_replay` allocates.
    kernels = Kernels(compute_capability=capability, torch_release=(2, 0))
    if is_ladder:
        # timm's benchmark.py with torch 1.12: one tensor at a time in SGD, gradients zeroed in
        # place, backward called inside autocast, attention written out.
        options = TraceOptions(
            compute_capability=capability,
            kernels=kernels,
            has_fused_attention=False,
            uses_foreach=False,
            keeps_gradients=True,
        )
    else:
        # timm's PrefetchLoader: one batch in the loop's variable, one in the generator's, one on
        # its way in bytes.
        options = TraceOptions(
            compute_capability=capability,
            kernels=kernels,
            num_prefetched_batches=2,
            prefetches_as_uint8=True,
        )
    # Before torch 2, autocast let interpolation run in half precision.
    precision_policy = MetaPrecision(
        step.options.precision,
        backward_in_autocast=is_ladder,
        fp32=frozenset(name for name in FP32 if "upsample" not in name) if is_ladder else FP32,
    )
    return trace(step, options, precision_policy=precision_policy)


def _replay(trace: Any, batch_size: int, *, blas_bytes: int, capacity_bytes: int | None) -> Any:
    from memfit.simulation.allocator.caching import AllocatorOutOfMemoryError, CachingAllocator

    allocator = CachingAllocator(capacity_bytes=capacity_bytes)
    try:
        for handle in (-1_000_001, -1_000_002):
            allocator.allocate(handle, blas_bytes)
        for _ in trace.schedule.play(allocator, batch_size):
            pass
    except AllocatorOutOfMemoryError:
        return None
    return allocator.stats


def _ladder_rows(task: Task) -> list[dict[str, Any]]:
    (row,) = task.rows
    trace = _trace(task)
    capacity = (RTX_3090_TOTAL_MIB - RTX_3090_CONTEXT_MIB) * MIB

    def fits(batch_size: int) -> bool:
        stats = _replay(trace, batch_size, blas_bytes=RTX_3090_BLAS_BYTES, capacity_bytes=capacity)
        return stats is not None

    rung = LADDER.index(int(row["batch_size_that_fit"]))
    while rung < len(LADDER) and not fits(LADDER[rung]):
        rung += 1
    while 0 < rung <= len(LADDER) and fits(LADDER[rung - 1]):
        rung -= 1
    predicted = LADDER[rung] if rung < len(LADDER) else 0

    def share(batch_size: str) -> float:
        """Return the bytes of tensors at their peak, as a share of the capacity."""
        stats = _replay(trace, int(batch_size), blas_bytes=RTX_3090_BLAS_BYTES, capacity_bytes=None)
        return stats.peak_allocated_bytes / capacity

    failed = row["batch_size_that_failed"]
    return [
        {
            "kind": "ladder",
            **row,
            "predicted": predicted,
            "fitted_share": share(row["batch_size_that_fit"]),
            "failed_share": share(failed) if failed else None,
        }
    ]


def _peak_rows(task: Task) -> list[dict[str, Any]]:
    trace = _trace(task)
    rows = []
    for row in task.rows:
        stats = _replay(
            trace, int(row["batch_size"]), blas_bytes=A100_BLAS_BYTES, capacity_bytes=None
        )
        rows.append(
            {"kind": "peak", **row, "reserved_mib": round(stats.peak_reserved_bytes / MIB, 1)}
        )
    return rows


# --- what is printed ------------------------------------------------------------------------------


def report_ladder(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Print how often the rung is right; rows without a failing size are counted separately."""
    print("RTX 3090 ladder: torch 1.12, AMP fp16, SGD with momentum, cudnn.benchmark")
    _print_errors(rows)
    known = [row for row in rows if "error" not in row]
    summary: dict[str, Any] = {"num_rows": len(rows), "num_untraced": len(rows) - len(known)}
    for name in ("nchw", "nhwc", "all"):
        bounded = [
            row
            for row in known
            if row["batch_size_that_failed"] and name in (row["memory_format"], "all")
        ]
        if not bounded:
            continue
        differences = [row["predicted"] - int(row["batch_size_that_fit"]) for row in bounded]
        shares = {
            "exact": sum(d == 0 for d in differences) / len(bounded),
            "too_low": sum(d < 0 for d in differences) / len(bounded),
            "too_high": sum(d > 0 for d in differences) / len(bounded),
        }
        summary[name] = {"num_rows": len(bounded), **shares}
        print(
            f"  {name:<5}{len(bounded):>5} rows  "
            + "  ".join(f"{k} {v:.1%}" for k, v in shares.items())
        )
    full = [row for row in known if not row["batch_size_that_failed"]]
    if full:
        right = sum(row["predicted"] == LADDER[0] for row in full)
        print(f"  512 fitted: {len(full)} rows, {right} predicted so")
        summary["unbounded"] = {"num_rows": len(full), "exact": right / len(full)}
    wrong = [row for row in known if row["predicted"] != int(row["batch_size_that_fit"])]
    wrong.sort(key=lambda row: row["failed_share"] or 0)
    print("  the worst 20:")
    for row in wrong[:20]:
        print(
            f"    {row['model']:<36}{row['memory_format']} {row['batch_size_that_fit']:>4} fitted, "
            f"{row['predicted']:>4} predicted: {_ladder_reason(row, known)}"
        )
    return summary


def _ladder_reason(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    if row["predicted"] < int(row["batch_size_that_fit"]):
        share = f"the size that fitted takes {row['fitted_share']:.0%} of the capacity in tensors"
        if row["fitted_share"] < 1:
            return f"{share}: no room for what the simulation adds as fragments and workspaces"
        return f"{share}: today's model or kernels take more"
    others = [
        other
        for other in rows
        if other["model"] == row["model"] and other["memory_format"] != row["memory_format"]
    ]
    share = f"the size that failed takes {row['failed_share']:.0%} of the capacity in tensors"
    if any(int(o["batch_size_that_fit"]) > int(row["batch_size_that_fit"]) for o in others):
        return f"{share}, and fitted in the other format"
    if row["failed_share"] > 1 - _CHANGED_SHARE:
        return f"{share}: within what fragments and workspaces take"
    return f"{share}: the model has changed, or the run failed for another reason"


def report_peaks(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Print relative errors, after one constant for the process that is fitted to the table."""
    print(
        "\nA100 40 GB peaks: timm's train.py, fp32, SGD with momentum, as the driver reports them"
    )
    _print_errors(rows)
    known = [row for row in rows if "error" not in row]
    if not known:
        return {"num_rows": len(rows)}
    constant = statistics.median(
        float(row["measured_peak_mib"]) - row["reserved_mib"] for row in known
    )
    print(f"  constant for the process, fitted once: {constant:.0f} MiB")
    for row in known:
        row["predicted_mib"] = row["reserved_mib"] + constant
        row["error_share"] = row["predicted_mib"] / float(row["measured_peak_mib"]) - 1
        row["faketensor_error_share"] = (
            float(row["faketensor_estimate_mib"]) / float(row["measured_peak_mib"]) - 1
            if row["faketensor_estimate_mib"]
            else None
        )
    summary = {
        "constant_mib": constant,
        "num_rows": len(rows),
        "num_untraced": len(rows) - len(known),
        "all": _quantiles("all rows", [row["error_share"] for row in known]),
        "faketensor": _quantiles(
            "FakeTensor",
            [r["faketensor_error_share"] for r in known if r["faketensor_error_share"] is not None],
        ),
    }
    ended = [row for row in known if _ended_early(row, constant)]
    if ended and len(ended) < len(known):
        name = f"less {len(ended)} ended"
        trained = [row["error_share"] for row in known if not _ended_early(row, constant)]
        summary["trained"] = _quantiles(name, trained)
    for size in sorted({int(row["batch_size"]) for row in known}):
        errors = [row["error_share"] for row in known if int(row["batch_size"]) == size]
        summary[f"batch_{size}"] = _quantiles(f"batch size {size}", errors)
    families = sorted({_family(row["model"]) for row in known})
    for family in families:
        errors = [row["error_share"] for row in known if _family(row["model"]) == family]
        if len(errors) >= 15 or family == "convnext":  # noqa: PLR2004 - fewer say little
            summary[f"family_{family}"] = _quantiles(family, errors)
    print("  the worst 20:")
    for row in sorted(known, key=lambda row: -abs(row["error_share"]))[:20]:
        print(
            f"    {row['model']:<40}{row['batch_size']:>4} "
            f"{float(row['measured_peak_mib']):>7.0f} MiB measured, {row['predicted_mib']:>7.0f} "
            f"predicted ({row['error_share']:+.0%}): {_peak_reason(row, known, constant)}"
        )
    return summary


def _quantiles(name: str, errors: list[float]) -> dict[str, float]:
    sizes = sorted(abs(error) for error in errors)
    found = {
        "num_rows": len(sizes),
        "median": sizes[len(sizes) // 2],
        "p90": sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))],
        "p95": sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))],
        "bias": statistics.median(errors),
    }
    print(
        f"  {name:<18}{len(sizes):>5} rows  median {found['median']:>6.1%}  "
        f"p90 {found['p90']:>6.1%}  p95 {found['p95']:>6.1%}  bias {found['bias']:+.1%}"
    )
    return found


def _peak_reason(row: dict[str, Any], rows: list[dict[str, Any]], constant: float) -> str:
    own = sorted(
        (r for r in rows if r["model"] == row["model"]), key=lambda r: int(r["batch_size"])
    )
    measured = {int(r["batch_size"]): float(r["measured_peak_mib"]) for r in own}
    predicted = {int(r["batch_size"]): r["predicted_mib"] for r in own}
    size = int(row["batch_size"])
    if row["error_share"] > 0:
        if _ended_early(row, constant):
            return "the run held less than the step's tensors: it ended before its first step"
        if len(own) > 1 and _slope(measured) < (1 - _CHANGED_SHARE) * _slope(predicted):
            return "grows less per sample: the model or its default image size has changed"
        return "plans or fragments that the simulation has and the run had not"
    if len(own) > 1 and min(measured) != size:
        smaller = max(s for s in measured if s < size)
        grown = measured[size] - measured[smaller]
        if grown > _JUMP_SHARE * (predicted[size] - predicted[smaller]):
            return "jumps beyond its tensors: a workspace that cudnn.benchmark tried"
    if len(own) > 1 and _slope(measured) > (1 + _CHANGED_SHARE) * _slope(predicted):
        return "grows more per sample: larger plans, other fragments, or the model has changed"
    return "a constant more: a workspace that cudnn.benchmark tried"


def _ended_early(row: dict[str, Any], constant: float) -> bool:
    """Return whether a run held less than half of what a step's tensors take."""
    measured = float(row["measured_peak_mib"])
    return bool(measured < constant + 0.5 * (row["predicted_mib"] - constant))


def _slope(peaks: dict[int, float]) -> float:
    first, last = min(peaks), max(peaks)
    return (peaks[last] - peaks[first]) / (last - first)


def _family(model: str) -> str:
    name = model.removeprefix("tf_").removeprefix("legacy_")
    return "".join(letter for letter in name.split("_")[0] if not letter.isdigit())


def _print_errors(rows: list[dict[str, Any]]) -> None:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "error" in row:
            reasons.setdefault(row["error"], []).append(row["model"])
    for reason, models in reasons.items():
        print(f"  not traced: {', '.join(sorted(set(models)))} ({len(models)} rows): {reason}")


if __name__ == "__main__":
    main()
