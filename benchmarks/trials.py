"""How many trials do rehearsed searches take, from the prediction to the recommendation?

    python benchmarks/trials.py resnet18 vit_tiny_patch16_224 --caps 4GiB 24GiB [--rows FILE]

Each model is searched for on a rehearsed RTX 3090 under each cap, with AdamW. With --rows, a line
of JSON is kept for each search, and a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

MODELS = (
    "resnet18",
    "resnet50",
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "convnext_tiny",
    "regnety_016",
    "vit_tiny_patch16_224",
    "vit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mixer_b16_224",
    "densenet121",
    "vgg11",
    "resnext50_32x4d",
    "seresnet50",
    "mobilenetv2_100",
    "mobilevit_s",
    "deit_small_patch16_224",
    "poolformer_s12",
    "coatnet_nano_rw_224",
    "maxvit_rmlp_pico_rw_256",
    "xcit_nano_12_p16_224",
    "levit_128s",
    "ghostnet_100",
    "repvgg_a0",
    "nfnet_f0",
    "efficientnetv2_rw_t",
    "hrnet_w18_small",
    "edgenext_x_small",
    "convnextv2_nano",
    "cait_xxs24_224",
)
GPU = "RTX 3090"


def main() -> None:
    """Print a row for each search, and the distribution."""
    import timm
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--caps", nargs="*", default=["4GiB", "24GiB"])
    parser.add_argument("--precisions", nargs="*", default=["amp-bf16"])
    parser.add_argument("--rows", type=Path, metavar="FILE", help="keep searches here and go on")
    arguments = parser.parse_args()
    print(
        f"{GPU}, rehearsed; {platform.machine()}, torch {torch.__version__}, cuDNN "
        f"{torch.backends.cudnn.version()}, timm {timm.__version__}, "
        f"{dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}.\n"
    )
    print("| model | precision | cap | predicted | edge | recommended | trials | tried | seconds |")
    print("|---|---|---|--:|--:|--:|--:|---|--:|")
    known = _kept(arguments.rows)
    counts = []
    for precision in arguments.precisions:
        for cap in arguments.caps:
            for model in arguments.models:
                key = f"{model} {precision} {cap}"
                if key not in known:
                    known[key] = {"key": key, **_searched(model, precision, cap)}
                    if arguments.rows is not None:
                        with arguments.rows.open("a") as file:
                            file.write(json.dumps(known[key]) + "\n")
                print(known[key]["row"], flush=True)
                counts.append(known[key]["num_trials"])
    counts.sort()
    print(
        f"\n{len(counts)} searches: median {statistics.median(counts)} trials, 90% take at most "
        f"{counts[int(0.9 * (len(counts) - 1))]}, at most {counts[-1]}."
    )


def _kept(rows: Path | None) -> dict[str, dict[str, Any]]:
    if rows is None or not rows.exists():
        return {}
    return {row["key"]: row for row in map(json.loads, rows.read_text().splitlines())}


def _searched(model: str, precision: str, cap: str) -> dict[str, Any]:
    import memfit

    start = time.perf_counter()
    result = memfit.probe(
        model, gpu=GPU, memory=cap, engine="rehearse", precision=precision, optimizer="adamw"
    )
    seconds = time.perf_counter() - start
    predicted = max((t.batch_size for t in result.predictions if t.fits), default=None)
    tried = " ".join(
        f"{trial.batch_size}{'' if trial.fits else '!'}{'r' if trial.num_alloc_retries else ''}"
        for trial in result.trials
    )
    row = (
        f"| {model} | {precision} | {cap} | {predicted} | {result.max_batch_size} "
        f"| {result.recommended_batch_size} | {len(result.trials)} | {tried} | {seconds:.0f} |"
    )
    return {"row": row, "num_trials": len(result.trials)}


if __name__ == "__main__":
    main()
