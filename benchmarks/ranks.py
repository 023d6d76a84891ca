"""What a rank of many holds beside a process that trains alone: DDP's buckets, FSDP2's shards.

    python benchmarks/ranks.py [--gpu NAME] [--model NAME] [--batch-size N] [--world-size N]

Each way is rehearsed on the card, as rank 0 of so many. The peak of an earlier prototype for the
same step is beside it, where there is one: vit_large with 32 images on an A100.
"""

from __future__ import annotations

import argparse
import datetime as dt
import platform
from typing import Any

from memfit.units import MIB

# MiB reserved. The prototype had scripts of its own, with PyTorch's wrappers.
_PROTOTYPE = {None: 10_290, "ddp": 11_650, "ddp-bucket-view": 11_506, "fsdp2": 5_994}
_CASE = ("a100-40gb", "vit_large_patch16_224", 32)


def main() -> None:
    """Print a row for each way."""
    import timm
    import torch

    import memfit

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gpu", default=_CASE[0])
    parser.add_argument("--model", default=_CASE[1])
    parser.add_argument("--batch-size", type=int, default=_CASE[2])
    parser.add_argument("--world-size", type=int, default=8)
    parser.add_argument("--precision", default="amp-bf16")
    arguments = parser.parse_args()
    print(
        f"{arguments.model}, batch size {arguments.batch_size}, {arguments.precision}, adamw, on "
        f"{arguments.gpu}, rehearsed; {platform.machine()}, torch {torch.__version__}, timm "
        f"{timm.__version__}, {dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}\n"
    )
    print("| way | allocated MiB | reserved MiB | prototype |")
    print("|---|--:|--:|--:|")
    is_case = (arguments.gpu, arguments.model, arguments.batch_size) == _CASE
    for way, before in _PROTOTYPE.items():
        ranks: dict[str, Any] = (
            {} if way is None else {"parallel": way, "world_size": arguments.world_size}
        )
        trial = memfit.estimate(
            arguments.model,
            arguments.batch_size,
            gpu=arguments.gpu,
            engine="rehearse",
            precision=arguments.precision,
            **ranks,
        )
        allocated, reserved = trial.peak_allocated_bytes, trial.peak_reserved_bytes
        print(
            f"| {way or 'alone'} | {(allocated or 0) / MIB:,.0f} | {(reserved or 0) / MIB:,.0f} | "
            f"{f'{before:,}' if is_case else ''} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
