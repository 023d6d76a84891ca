"""What `--checkpoint auto` costs, beside all blocks, and beside PyTorch's `SACEstimator`.

    python benchmarks/checkpointing.py [--gpu NAME] [--only MODEL ...]

Each case is a batch size that does not fit as it is. Four ways are rehearsed on the card: the step
as it is, timm's `set_grad_checkpointing`, the blocks that memfit chooses, and the blocks that
follow from the estimates of `torch.distributed._tools.sac_estimator.SACEstimator` for the same
blocks: the cheapest whose saved activations are what the step lacks. Its times are those of its
roofline model for an H100, and only their ratios count. A line has the blocks that are recomputed,
the operations that are done again as a share of those of forward, and the peak.
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
import time
import warnings
from collections.abc import Sequence
from typing import Any

CASES = (
    ("resnet50", 320),
    ("convnext_tiny", 240),
    ("swin_tiny_patch4_window7_224", 200),
    ("vit_small_patch16_224", 400),
    ("efficientnet_b3", 96),
)
_ESTIMATES = "--estimates-of"
_PRECISION = "amp-bf16"


def main() -> None:
    """Try every case, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gpu", default="rtx3060")
    parser.add_argument("--only", nargs="+", default=[], metavar="MODEL")
    parser.add_argument(_ESTIMATES, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.estimates_of:
        model, batch_size = arguments.estimates_of
        print(json.dumps(_estimates(model, int(batch_size))))
        return
    import timm
    import torch

    start = time.perf_counter()
    print(
        f"{arguments.gpu}, {_PRECISION}, adamw, rehearsed; {platform.machine()}, torch "
        f"{torch.__version__}, timm {timm.__version__}, "
        f"{dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}\n"
    )
    print("| model | batch | way | blocks again | of forward again | peak MiB | fits |")
    print("|---|--:|---|--:|--:|--:|---|")
    for model, batch_size in CASES:
        if not arguments.only or model in arguments.only:
            _case(model, batch_size, arguments.gpu)
    print(f"\n{time.perf_counter() - start:.0f} s")


def _case(model: str, batch_size: int, gpu: str) -> None:
    import memfit
    from memfit.api.steps import describe
    from memfit.cards import find_gpu
    from memfit.planning.blocks import recomputable
    from memfit.simulation.recomputation import Recomputable
    from memfit.units import MIB

    card = find_gpu(gpu)
    data = recomputable(describe(model, precision=_PRECISION), card, batch_size)
    every = [block.name for block in data.blocks]

    def shown(way: str, names: Sequence[str], **options: Any) -> Any:
        trial = memfit.estimate(
            model, batch_size, gpu=gpu, engine="rehearse", precision=_PRECISION, **options
        )
        peak = trial.peak_reserved_bytes
        print(
            f"| {model} | {batch_size} | {way} | {len(names)} of {len(every)} | "
            f"{data.share_of(names):.1%} | {'' if not trial.fits else f'{peak / MIB:,.0f}'} | "
            f"{'yes' if trial.fits else 'no'} |",
            flush=True,
        )
        return trial

    shown("as it is", ())
    shown("set_grad_checkpointing", every, grad_checkpointing=True)
    plan = memfit.plan(
        model,
        batch_size,
        gpu=gpu,
        engine="rehearse",
        precision=_PRECISION,
        checkpoint="auto",
        headroom=0.0,
        progress=None,
    )
    assert isinstance(plan, memfit.Plan)
    chosen = plan.options.checkpoint if plan.accumulation_steps == 1 else ()
    shown("memfit", chosen, checkpoint=chosen)
    try:
        estimates = _estimated(model, batch_size, gpu)
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().rpartition("\n")[2]
        print(f"| {model} | {batch_size} | SACEstimator | | | | {reason} |", flush=True)
        return
    theirs = Recomputable(
        blocks=tuple(
            dataclasses.replace(
                block,
                flops=int(1e6 * estimates[block.name][1]),
                parked_bytes=int(estimates[block.name][0]),
                recomputed_bytes=0,
            )
            for block in data.blocks
            if block.name in estimates
        ),
        moments=tuple(moment for moment in data.moments if moment.num_parked == len(every)),
        total_flops=1,
    )
    names = theirs.cheapest(card.usable_bytes)
    names = tuple(every) if names is None else names
    shown("SACEstimator", names, checkpoint=names)


def _estimated(model: str, batch_size: int, gpu: str) -> dict[str, tuple[int, float]]:
    """Return for each block its saved bytes and its milliseconds, as `SACEstimator` has them."""
    from memfit.cards import find_gpu
    from memfit.rehearsal.activate import rehearsed_environment

    environment = rehearsed_environment(find_gpu(gpu), environment=os.environ)
    done = subprocess.run(
        [sys.executable, __file__, _ESTIMATES, model, str(batch_size)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return {name: tuple(found) for name, found in json.loads(done.stdout.splitlines()[-1]).items()}


def _estimates(model: str, batch_size: int) -> dict[str, tuple[int, float]]:
    """Run `SACEstimator` on a model, with fake tensors of a CUDA device."""
    import timm
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.sac_estimator import SACEstimator

    from memfit.step.checkpointing import blocks_of

    made = timm.create_model(model).cuda()
    made.train()
    _, height, width = made.pretrained_cfg["input_size"]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        images = torch.randn(batch_size, 3, height, width)
        estimator = SACEstimator(gpu_type="NVIDIA H100")
        with (
            estimator(estimate_mode_type="operator-level-cost-model"),
            torch.autocast("cuda", dtype=torch.bfloat16),
        ):
            made(images)
    found = {}
    for name in blocks_of(made):
        stats = estimator.sac_mod_stats.get(f"{type(made).__name__}.{name}")
        if stats is not None:
            saved = sum(stats.memory[index] for index in stats.saved_autograd_ops)
            found[name] = (saved, sum(stats.runtimes))
    return found


if __name__ == "__main__":
    main()
