"""How many trials do rehearsed searches take, from the prediction to the recommendation?

    python benchmarks/trials.py resnet18 vit_tiny_patch16_224 --caps 4GiB 24GiB

Each model is searched for on a rehearsed RTX 3090 under each cap, with AdamW.
"""

from __future__ import annotations

import argparse
import datetime as dt
import platform
import statistics
import time

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
    arguments = parser.parse_args()
    print(
        f"{GPU}, rehearsed; {platform.machine()}, torch {torch.__version__}, cuDNN "
        f"{torch.backends.cudnn.version()}, timm {timm.__version__}, "
        f"{dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}.\n"
    )
    print("| model | precision | cap | predicted | edge | recommended | trials | tried | seconds |")
    print("|---|---|---|--:|--:|--:|--:|---|--:|")
    counts = [
        _searched(model, precision, cap)
        for precision in arguments.precisions
        for model in arguments.models
        for cap in arguments.caps
    ]
    counts.sort()
    print(
        f"\n{len(counts)} searches: median {statistics.median(counts)} trials, 90% take at most "
        f"{counts[int(0.9 * (len(counts) - 1))]}, at most {counts[-1]}."
    )


def _searched(model: str, precision: str, cap: str) -> int:
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
    print(
        f"| {model} | {precision} | {cap} | {predicted} | {result.max_batch_size} "
        f"| {result.recommended_batch_size} | {len(result.trials)} | {tried} | {seconds:.0f} |",
        flush=True,
    )
    return len(result.trials)


if __name__ == "__main__":
    main()
