"""How right the simulation is, against published measurements of real GPUs.

    python benchmarks/accuracy.py --data FOLDER [--sample N] [--seed S] [--jobs J] [--json FILE]
                                  [--rows FILE] [--ask-cudnn]

FOLDER has `timm-train-rtx3090.csv` (which rung of a ladder of batch sizes fitted),
`timm-train-a100-40gb.csv` (peak memory of a process) and `pepr-rtx3090.csv` (peaks of the
allocator). A table that is not there is left out. docs/accuracy.md says where they come from
and how to read the output. Nothing is downloaded. With --rows, a line of JSON is written for each
row as soon as it is known. A run that was interrupted then goes on where it stopped.

The ladder's models are those of timm 0.6.7. With that timm first in PYTHONPATH, the ladder is all
that is compared, because memfit needs a newer one for the other tables.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import multiprocessing
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from accuracy_report import LADDER, report_allocator_peaks, report_ladder, report_peaks

MIB = 2**20

# torch 1.12 on the driver of the time. CUDA 11 before 11.7 loads every kernel when the context is
# made: 1687 MiB were measured on this card with CUDA 11.1 (pytorch/pytorch#55277), less the segment
# of 2 MiB of the tensor that made it.
RTX_3090_TOTAL_MIB = 24268
RTX_3090_CONTEXT_MIB = 1687 - 2
# 1644 MiB were measured with CUDA 11.0 (pytorch/pytorch#49877), less the segment of a tensor of
# 156.25 MiB. CUDA 11.3 was not measured on it: the ladder is answered with both.
RTX_3090_SMALLER_CONTEXT_MIB = 1644 - 158
# Before torch 1.13, cuBLAS allocated the workspaces of its handles itself (pytorch/pytorch#83461):
# 4 MiB each on Ampere, by its documentation. Forward has a handle, and backward has one.
RTX_3090_BLAS_BYTES = 2 * 4 * MIB
A100_BLAS_BYTES = 8_519_680
PEPR_BLAS_BYTES = 8_519_680
PEPR_BATCH_SIZE = 32
PEPR_IMAGE_SIZE = 256
PEPR_NUM_CLASSES = 7
# The heads of old models: today some of these names have no classes in their configuration.
NUM_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Task:
    """One model in one setting, with all of its rows."""

    kind: str
    model: str
    memory_format: str
    image_size: int | None
    rows: tuple[dict[str, str], ...]
    asks_cudnn: bool = False


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
    parser.add_argument(
        "--ask-cudnn",
        action="store_true",
        help="workspaces as the installed cuDNN says, which is not the cuDNN of the runs",
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    tasks = _sampled(_tasks(arguments.data), arguments.sample, arguments.seed)
    tasks = [dataclasses.replace(task, asks_cudnn=arguments.ask_cudnn) for task in tasks]
    rows = _rows(tasks, arguments.rows, arguments.jobs)
    reports = {
        "ladder": report_ladder,
        "peak": report_peaks,
        "pepr": report_allocator_peaks,
    }
    summary = {}
    for kind, report in reports.items():
        told = [row for row in rows if row["kind"] == kind]
        if told:
            summary[kind] = report(told)
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


def _tasks(folder: Path) -> list[Task]:
    """Return what the installed timm can be compared with."""
    import timm

    ladder = _ladder_tasks(folder)
    if timm.__version__.startswith("0."):
        return ladder
    return [*ladder, *_peak_tasks(folder), *_pepr_tasks(folder)]


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


def _pepr_tasks(folder: Path) -> list[Task]:
    rows = _read(folder / "pepr-rtx3090.csv")
    return [Task("pepr", row["model"], "nchw", PEPR_IMAGE_SIZE, (row,)) for row in rows]


def _read(path: Path) -> list[dict[str, str]]:
    if not path.parent.is_dir():
        sys.exit(f"There is no folder {path.parent}: give --data the folder of the tables.")
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        print(f"There is no {path.name}: its rows are left out.")
        return []


def _sampled(tasks: list[Task], num_models: int | None, seed: int) -> list[Task]:
    if num_models is None:
        return tasks
    chosen = []
    for kind in ("ladder", "peak", "pepr"):
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
        return {"ladder": _ladder_rows, "peak": _peak_rows, "pepr": _pepr_rows}[task.kind](task)
    except Exception as error:  # noqa: BLE001 - every row is shown, this one with its reason
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
        return [{"kind": task.kind, **row, "error": reason} for row in task.rows]


def _step_schedule(task: Task) -> Any:
    import timm
    import torch
    from accuracy_loops import with_batch_of_bytes

    import memfit.api  # noqa: F401 - cuDNN finds a driver, as in every command
    from memfit.backends.traces import trace
    from memfit.records import Precision, StepOptions
    from memfit.step.training_step import TrainingStep

    config = timm.models.get_pretrained_cfg(task.model)
    is_pepr = task.kind == "pepr"
    size = task.image_size
    has_no_classes = config is not None and config.num_classes == 0
    # `cudnn.benchmark` is off by default. PePR turned `cudnn.deterministic` on.
    torch.backends.cudnn.deterministic = is_pepr
    step = TrainingStep(
        subject=task.model,
        options=StepOptions(
            precision=Precision.FP32,
            optimizer="adam" if is_pepr else "sgd",
            image_size=None if size is None else (size, size),
            num_classes=PEPR_NUM_CLASSES if is_pepr else NUM_CLASSES if has_no_classes else None,
            keeps_outputs=is_pepr,
            # timm's PrefetchLoader: one batch in the loop's variable, and one in the generator's.
            prefetch=0 if is_pepr else 2,
        ),
    )
    made = trace(step, _options(task, (8, 6) if is_pepr else (8, 0)))
    # One batch more is on its way in bytes.
    return (made if is_pepr else with_batch_of_bytes(made, step)).schedule


def _ladder_schedule(task: Task) -> Any:
    from accuracy_loops import OldPrecision, OldStep, attention_written_out
    from ladders import made_once

    import memfit.api  # noqa: F401 - cuDNN finds a driver, as in every command
    from memfit.backends.traces import trace
    from memfit.records import Precision, StepOptions

    assert task.image_size is not None
    step = OldStep(
        subject=task.model,
        options=StepOptions(
            precision=Precision.AMP_FP16,
            optimizer="sgd",
            channels_last=task.memory_format == "nhwc",
            image_size=(task.image_size, task.image_size),
            num_classes=NUM_CLASSES,
        ),
    )
    with attention_written_out():
        made = trace(step, _options(task, (8, 6)), precision_policy=OldPrecision())
    return made_once(made.schedule, is_last=step.options.channels_last)


def _options(task: Task, capability: tuple[int, int]) -> Any:
    import torch

    from memfit.simulation.tracing.trace import TraceOptions
    from memfit.simulation.tracing.workspace import Kernels

    torch.set_num_threads(1)
    # Torch of those days kept the BLAS workspaces that `_replay` allocates.
    kernels = Kernels(
        compute_capability=capability, torch_release=(2, 0), asks_cudnn=task.asks_cudnn
    )
    return TraceOptions(
        compute_capability=capability,
        kernels=kernels,
        # One tensor at a time in SGD, as in torch 1.12.
        uses_foreach=task.kind != "ladder",
        cudnn_benchmark=task.kind != "pepr",
    )


def _replay(schedule: Any, batch_size: int, *, blas_bytes: int) -> Any:
    from memfit.simulation.allocator.blocks import BlockOrder
    from memfit.simulation.allocator.compiled import new_allocator
    from memfit.simulation.allocator.settings import AllocatorSettings

    allocator = new_allocator(
        capacity_bytes=None, settings=AllocatorSettings(block_order=BlockOrder.ADDRESS)
    )
    for handle in (-1_000_001, -1_000_002):
        allocator.allocate(handle, blas_bytes)
    for _ in schedule.play(allocator, batch_size):
        pass
    return allocator.stats


def _ladder_rows(task: Task) -> list[dict[str, Any]]:
    from ladders import Images, simulated_rung

    (row,) = task.rows
    schedule = _ladder_schedule(task)
    assert task.image_size is not None
    images = Images(size=task.image_size, is_last=task.memory_format == "nhwc")
    capacity, larger = (
        (RTX_3090_TOTAL_MIB - context) * MIB - RTX_3090_BLAS_BYTES
        for context in (RTX_3090_CONTEXT_MIB, RTX_3090_SMALLER_CONTEXT_MIB)
    )

    def rung(capacity_bytes: int) -> int:
        return simulated_rung(schedule, LADDER, capacity_bytes=capacity_bytes, images=images)

    def share(batch_size: str) -> float:
        """Return the bytes of tensors at their peak, as a share of the capacity."""
        stats = _replay(schedule, int(batch_size), blas_bytes=0)
        return stats.peak_allocated_bytes / capacity

    failed = row["batch_size_that_failed"]
    return [
        {
            "kind": "ladder",
            **row,
            "predicted": rung(capacity),
            "predicted_with_smaller_context": rung(larger),
            "fitted_share": share(row["batch_size_that_fit"]),
            "failed_share": share(failed) if failed else None,
        }
    ]


def _peak_rows(task: Task) -> list[dict[str, Any]]:
    schedule = _step_schedule(task)
    rows = []
    for row in task.rows:
        stats = _replay(schedule, int(row["batch_size"]), blas_bytes=A100_BLAS_BYTES)
        rows.append(
            {"kind": "peak", **row, "reserved_mib": round(stats.peak_reserved_bytes / MIB, 1)}
        )
    return rows


def _pepr_rows(task: Task) -> list[dict[str, Any]]:
    (row,) = task.rows
    stats = _replay(_step_schedule(task), PEPR_BATCH_SIZE, blas_bytes=PEPR_BLAS_BYTES)
    found = {
        "simulated_allocated_bytes": stats.peak_allocated_bytes,
        "simulated_reserved_bytes": stats.peak_reserved_bytes,
    }
    return [{"kind": "pepr", **row, **found}]


if __name__ == "__main__":
    main()
