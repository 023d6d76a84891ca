"""Shows a probe's result in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memfit.records import (
    Averaging,
    DeviceProcess,
    Evaluation,
    Parallel,
    Plan,
    ProbeResult,
    Source,
    StepOptions,
    Trial,
    WorkspaceSource,
)
from memfit.reports.sources import MORE_MAY_FIT, about, said_of_kernels, said_of_precision
from memfit.reports.tables import plain_table
from memfit.units import MIB, format_bytes

__all__ = [
    "heading",
    "kept_free",
    "once_each",
    "render",
    "share_free",
    "step_words",
    "trial_notes",
    "trial_table",
    "why_largest",
    "why_recommended",
]

_OUT_OF_MEMORY = "out of memory"
_ACCUMULATED = "accumulated"
_NUM_HOLES = 3
# More free than asked for by this share is explained.
_MUCH_FREE = 0.03
_MOST_NAMED = 3
_PARALLEL = {
    Parallel.DDP: "DDP",
    Parallel.DDP_BUCKET_VIEW: "DDP with gradients as bucket views",
    Parallel.FSDP2: "FSDP2",
}


def render(result: ProbeResult) -> RenderableType:
    """Lay out a probe's result.

    Args:
        result: The probe's result.

    Returns:
        An object for `rich.console.Console.print`. It shows the step and the device, the trials,
        the largest and the recommended batch size, and remarks.
    """
    parts: list[RenderableType] = [
        heading(result),
        "",
        trial_table(result.trials, result.predictions),
        "",
        _answers(result),
    ]
    parts += ["", *(Text(note) for note in trial_notes(result))]
    return Group(*parts)


def heading(result: ProbeResult | Plan) -> Text:
    """Return a line with the step, the device, and the memory that the step could use."""
    return Text.assemble(
        (result.subject, "bold"),
        f" on {result.device}\n",
        (" · ".join(step_words(result.options)), "dim"),
        "\n",
        f"{format_bytes(result.capacity.usable_bytes)} usable ({result.capacity.origin})",
        *(f"\n{_holds(process)}" for process in result.capacity.other_processes),
    )


def _holds(process: DeviceProcess) -> str:
    used = process.used_bytes
    how_much = "an unknown amount" if used is None else format_bytes(used)
    return f"{process.name} (pid {process.pid}) holds {how_much}"


def step_words(options: StepOptions) -> list[str]:
    """Return the options of a training step, in a few words each."""
    words = [options.precision.value]
    if options.evaluate is not None:
        where = " in training" if options.evaluate is Evaluation.IN_TRAINING else ""
        words.append(f"evaluation{where}{' under no_grad' if options.no_grad else ''}")
    # An evaluation alone has no optimizer.
    if options.optimizer is not None and options.evaluate is not Evaluation.ALONE:
        words.append(options.optimizer)
    if options.image_size is not None:
        words.append("{}x{} px".format(*options.image_size))
    if options.num_classes is not None:
        words.append(f"{options.num_classes} classes")
    flags = {
        "channels last": options.channels_last,
        "gradient checkpointing": options.grad_checkpointing,
        "accumulating": options.accumulate,
        "outputs kept": options.keeps_outputs,
        "fused optimizer": options.fused,
        "optimizer in backward": options.optimizer_in_backward,
        "compiled": options.compile,
    }
    words += [word for word, is_set in flags.items() if is_set]
    if options.ema is not None:
        words.append("EMA" if options.ema is Averaging.DEVICE else "EMA in host memory")
    if options.parallel is not None:
        words.append(f"{_PARALLEL[options.parallel]}, rank 0 of {options.world_size}")
    if options.frozen:
        words.append(f"frozen {', '.join(options.frozen)}")
    if options.checkpoint:
        words.append(_recomputed(options.checkpoint))
    if options.prefetch:
        words.append(f"{options.prefetch} prefetched")
    return words + [f"{key}={value}" for key, value in options.model_kwargs]


def _recomputed(blocks: tuple[str, ...]) -> str:
    if len(blocks) > _MOST_NAMED:
        return f"{len(blocks)} blocks recomputed"
    return f"{', '.join(blocks)} recomputed"


def trial_table(trials: tuple[Trial, ...], predictions: tuple[Trial, ...] = ()) -> Table:
    """Lay out trials, each beside its prediction, if there are predictions."""
    trials = once_each(trials)
    has_kinds = len({trial.num_micro_batches for trial in trials}) > 1
    predicted = {trial.batch_size: trial for trial in predictions}
    # In a simulation nothing runs, so there are no times.
    is_timed = not trials or any(trial.source is Source.MEASURED for trial in trials)
    table = plain_table()
    table.add_column("batch", justify="right")
    if has_kinds:
        table.add_column("gradients")
    table.add_column("outcome")
    table.add_column("peak", justify="right")
    if predicted:
        table.add_column("predicted", justify="right")
    table.add_column("retries", justify="right")
    if is_timed:
        table.add_column("s/step", justify="right")
        table.add_column("samples/s", justify="right")
    for trial in trials:
        speed = trial.samples_per_second if trial.fits else None
        pace = ("", "") if speed is None else (f"{trial.step_seconds:.3g}", f"{speed:.4g}")
        table.add_row(
            str(trial.batch_size),
            *((_ACCUMULATED if trial.num_micro_batches > 1 else "",) if has_kinds else ()),
            Text("fits", "green") if trial.fits else Text(_OUT_OF_MEMORY, "red"),
            "" if trial.peak_reserved_bytes is None else format_bytes(trial.peak_reserved_bytes),
            *((_predicted(predicted.get(trial.batch_size)),) if predicted else ()),
            str(trial.num_alloc_retries),
            *(pace if is_timed else ()),
        )
    return table


def once_each(trials: tuple[Trial, ...]) -> tuple[Trial, ...]:
    """Return the trials without repeated trials that had the same outcome."""
    last = {
        (trial.batch_size, trial.num_micro_batches, trial.outcome): index
        for index, trial in enumerate(trials)
    }
    return tuple(trials[index] for index in sorted(last.values()))


def _predicted(trial: Trial | None) -> str:
    if trial is None or trial.peak_reserved_bytes is None:
        return ""
    return format_bytes(trial.peak_reserved_bytes) if trial.fits else _OUT_OF_MEMORY


def _answers(result: ProbeResult) -> Table:
    table = plain_table(has_header=False)
    largest = about(result.max_batch_size, result.trials)
    table.add_row("largest", Text(largest, "bold"), why_largest(result))
    recommended = result.recommended_batch_size
    table.add_row(
        "recommended",
        Text("none" if recommended is None else str(recommended), "bold green"),
        why_recommended(result),
    )
    return table


def why_largest(result: ProbeResult) -> str:
    """Say why the largest batch size is the largest, and which smaller sizes ran out.

    Args:
        result: The probe's result.
    """
    best = result.max_batch_size
    if not result.edge_found:
        said = (
            "where the search ended, for the reason below"
            if result.remarks
            else f"the limit of the search; {MORE_MAY_FIT}"
        )
    elif result.is_approximate:
        said = f"{best} fitted and {best + 1} ran out, with NVIDIA's kernels in place of AMD's"
    else:
        said = f"it fitted, and {best + 1} ran out of memory"
    holes = _holes(result.trials)
    if holes:
        said += f"; below it {', '.join(map(str, holes))} ran out too"
    return f"{result.source.value}: {said}"


def why_recommended(result: ProbeResult) -> str:
    """Say why the recommendation is below the largest batch size.

    Args:
        result: The probe's result.
    """
    recommended = result.recommended_batch_size
    multiple = f", a multiple of {result.multiple_of}" if result.multiple_of > 1 else ""
    if recommended is None:
        rule = f"{result.headroom:.0%} kept free"
        return f"no batch size that fits leaves {rule}{multiple} without allocator retries"
    rule = kept_free(result)
    if rule.endswith("retries"):
        multiple = multiple.replace(" a ", " ")  # so that it stays one line
    rule += multiple
    trial = result.trial_at(recommended)
    peak = None if trial is None else trial.peak_reserved_bytes
    return rule if peak is None else f"{format_bytes(peak)} at the peak; {rule}"


def kept_free(result: ProbeResult | Plan) -> str:
    """Say what the recommendation keeps free, and no retries where larger sizes had some.

    Args:
        result: The probe's result, or a plan.
    """
    rule = share_free(_recommended_trial(result), result.capacity.usable_bytes, result.headroom)
    has_retries = any(trial.num_alloc_retries and trial.fits for trial in result.trials)
    return f"{rule}, no retries" if has_retries else rule


def _recommended_trial(result: ProbeResult | Plan) -> Trial | None:
    if isinstance(result, ProbeResult):
        return result.trial_at(result.recommended_batch_size or 0)
    size = result.recommended_micro_batch_size
    kept = (t for t in reversed(result.trials) if t.batch_size == size and t.num_micro_batches > 1)
    return next(kept, None)


def share_free(trial: Trial | None, usable_bytes: int, headroom: float) -> str:
    """Say what share a batch size keeps free, and what was asked for if that is less.

    Args:
        trial: The trial of the batch size, if there was one.
        usable_bytes: What the step could use.
        headroom: The share that was asked for.
    """
    peak = None if trial is None else trial.peak_reserved_bytes
    percent = None if peak is None else math.floor(100 * (1 - peak / usable_bytes))
    asked = round(100 * headroom)
    if percent is None or percent <= asked:
        return f"{asked}% kept free"
    return f"{percent}% kept free{f' ({asked}% asked)' if percent - asked > 1 else ''}"


def _much_free(result: ProbeResult) -> str | None:
    """Return a note, if the recommendation keeps more free than it has to, by some percent."""
    trial, size = _recommended_trial(result), result.recommended_batch_size
    peak = None if trial is None else trial.peak_reserved_bytes
    if peak is None or size is None or size + result.multiple_of > result.max_batch_size:
        return None
    if 1 - peak / result.capacity.usable_bytes < result.headroom + _MUCH_FREE:
        return None
    return (
        f"More than {result.headroom:.0%} is kept free because reserved memory does not grow "
        "evenly. No larger batch size that was looked at keeps it free without allocator retries."
    )


def trial_notes(result: ProbeResult | Plan) -> list[str]:
    """Return notes about trials; the last note says how they were made."""
    said = [] if isinstance(result, Plan) else list(result.remarks)
    devices = [part.device for part in result.ranks] if isinstance(result, Plan) else []
    precision = result.options.precision
    said += said_of_precision((device, precision) for device in devices or [result.device])
    if result.environment:
        said.append(
            f"Trials ran with {' '.join(result.environment)}. Train with the same "
            "setting, or leave more room. Without it, glibc's heap fragments and "
            "the same step needs more memory."
        )
    if any(trial.workspaces is WorkspaceSource.CUDNN for trial in result.trials):
        said.append("The installed cuDNN was asked for the workspaces of the convolutions.")
    elif any(trial.workspaces is WorkspaceSource.BOUND for trial in result.trials):
        said.append(
            "The workspaces of the convolutions are bounds, because cuDNN could not be asked "
            "(a torch for CUDA brings it, from cuDNN 9.8 on, for a B200 from 9.13 on; it knows "
            "NVIDIA's cards)."
        )
    left = max((trial.left_behind_bytes or 0 for trial in result.trials), default=0)
    if left >= MIB:
        said.append(
            f"Up to {format_bytes(left)} stayed allocated after a trial was cleaned "
            "up. A new process starts without it."
        )
    growing = sorted({trial.batch_size for trial in result.trials if trial.peak_grows})
    if growing:
        said.append(
            "The peak still grew when the trial ended at batch size "
            f"{', '.join(map(str, growing))}. Longer training may need more."
        )
    said += _on_retries(result)
    free = _much_free(result) if isinstance(result, ProbeResult) else None
    if free is not None:
        said.append(free)
    holes = _holes(result.trials)
    if holes:
        said.append(
            f"{', '.join(map(str, holes))} ran out of memory although a larger "
            "batch fits. Convolutions use other algorithms at other sizes, and the "
            "allocator's blocks fit differently. Sizes that were not tried may run "
            "out as well."
        )
    if any(trial.peak_varies for trial in result.trials):
        said.append(
            "The step chooses at random which layers it runs (LayerDrop, "
            "stochastic depth by whole blocks), so its memory is random. The "
            "figures are for the largest choice."
        )
    said += said_of_kernels(result.trials)
    again = len(result.trials) - len(once_each(result.trials))
    took = sum(trial.fits for trial in result.trials)
    versions = f"torch {result.torch_version}"
    kind = result.source.value.capitalize()
    said.append(
        f"{kind} in {len(result.trials)} trial{'' if len(result.trials) == 1 else 's'} "
        f"({len(result.trials) - took} ran out"
        f"{f', {again} repeated' if again else ''}) and "
        f"{result.seconds:.1f} s with {versions}."
    )
    return said


def _sizes(batch_sizes: list[int]) -> str:
    """Return one batch size, or the range of several, as text."""
    low, high = min(batch_sizes), max(batch_sizes)
    return f"Batch size {low}" if low == high else f"Batch sizes from {low} to {high}"


def _on_retries(result: ProbeResult | Plan) -> Iterator[str]:
    """Say which batch sizes needed allocator retries, and which fitted but did not again."""
    edge = result.max_micro_batch_size if isinstance(result, Plan) else result.max_batch_size
    refuted = _refuted(result.trials, edge)
    retried = [
        trial.batch_size
        for trial in result.trials
        if trial.num_alloc_retries and trial.fits and trial.batch_size not in refuted
    ]
    if retried:
        yield (
            f"{_sizes(retried)} fitted only with allocator retries, which are slow. "
            "The recommended batch size needs none."
        )
    if refuted:
        yield (
            f"{_sizes(refuted)} fitted in one trial and ran out of memory in another, so memfit "
            "counts on fewer."
        )


def _refuted(trials: tuple[Trial, ...], edge: int) -> list[int]:
    """Return the batch sizes above the edge that fitted once and ran out at another time."""
    fitted, ran_out = (
        {
            (trial.batch_size, trial.num_micro_batches)
            for trial in trials
            if trial.fits is fits and trial.batch_size > edge
        }
        for fits in (True, False)
    )
    return sorted({batch_size for batch_size, _ in fitted & ran_out})


def _holes(trials: tuple[Trial, ...]) -> list[int]:
    """Return the batch sizes that ran out although a larger one fits, in the same kind of step."""
    fits: dict[int, int] = {}
    for trial in trials:
        if trial.fits:
            kind = trial.num_micro_batches
            fits[kind] = max(fits.get(kind, 0), trial.batch_size)
    return sorted(
        {
            trial.batch_size
            for trial in trials
            if not trial.fits and trial.batch_size < fits.get(trial.num_micro_batches, 0)
        }
    )[:_NUM_HOLES]
