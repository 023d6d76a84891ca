"""What benchmarks/accuracy.py prints: how often the simulation is right, and why it is not.

Each reason in the lists of the worst rows is a guess from the row and from the other rows of the
same model.
"""

from __future__ import annotations

import statistics
from typing import Any

LADDER = (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
_CHANGED_SHARE = 0.08
_JUMP_SHARE = 1.5


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
        summary[name] = {"num_rows": len(bounded), **_rung_shares(name, bounded, "predicted")}
        if name == "all":
            summary["smaller_context"] = _rung_shares(
                "all, with the smaller context", bounded, "predicted_with_smaller_context"
            )
    full = [row for row in known if not row["batch_size_that_failed"]]
    if full:
        right = sum(row["predicted"] == LADDER[0] for row in full)
        print(f"  512 fitted: {len(full)} rows, {right} predicted so")
        summary["unbounded"] = {"num_rows": len(full), "exact": right / len(full)}
    wrong = [row for row in known if row["predicted"] != int(row["batch_size_that_fit"])]
    wrong.sort(key=lambda row: row["failed_share"] or 0)
    print("  the wrong ones:")
    for row in wrong:
        print(
            f"    {row['model']:<36}{row['memory_format']} {row['batch_size_that_fit']:>4} fitted, "
            f"{row['predicted']:>4} predicted: {_ladder_reason(row, known)}"
        )
    return summary


def _rung_shares(name: str, rows: list[dict[str, Any]], key: str) -> dict[str, float]:
    differences = [row[key] - int(row["batch_size_that_fit"]) for row in rows]
    shares = {
        "exact": sum(d == 0 for d in differences) / len(rows),
        "too_low": sum(d < 0 for d in differences) / len(rows),
        "too_high": sum(d > 0 for d in differences) / len(rows),
    }
    said = "  ".join(f"{kind} {share:.1%}" for kind, share in shares.items())
    print(f"  {name:<5}{len(rows):>5} rows  {said}")
    return shares


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


def report_allocator_peaks(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Print relative errors of the allocator's peaks. No constant is fitted."""
    print(
        "\nPePR, RTX 3090: fp32, Adam, batch size 32, images of 256 pixels, cudnn.deterministic, "
        "outputs kept"
    )
    _print_errors(rows)
    known = [row for row in rows if "error" not in row]
    summary: dict[str, Any] = {"num_rows": len(rows), "num_untraced": len(rows) - len(known)}
    if not known:
        return summary
    for name in ("allocated", "reserved"):
        for row in known:
            measured = float(row[f"peak_{name}_bytes"])
            row[f"{name}_error_share"] = row[f"simulated_{name}_bytes"] / measured - 1
        summary[name] = _quantiles(name, [row[f"{name}_error_share"] for row in known])
    print("  the worst 12, by reserved bytes:")
    for row in sorted(known, key=lambda row: -abs(row["reserved_error_share"]))[:12]:
        measured = float(row["peak_reserved_bytes"]) / 2**20
        print(
            f"    {row['model']:<36} allocated {row['allocated_error_share']:+7.1%}, reserved "
            f"{row['reserved_error_share']:+7.1%} of {measured:.0f} MiB"
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
