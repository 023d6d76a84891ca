"""How long a simulated answer takes, and what it holds.

    python benchmarks/speed.py [--zoo N] [--seed S]

For six models: cold seconds and peak resident bytes of `memfit probe MODEL` for a dozen simulated
cards in a fresh process; warm seconds of the same after imports, of tracing alone, and of one card
more. With `--zoo`, tracing a sample of timm's registered models: how many trace, what fails, and
how seconds grow with the number of operations.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import subprocess
import sys
import time
import warnings

MODELS = (
    "resnet50",
    "vit_large_patch16_224",
    "convnext_base",
    "swin_base_patch4_window7_224",
    "efficientnet_b4",
    "nfnet_f4",
)


def main() -> None:
    """Time everything, print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zoo", type=int, default=0, metavar="N", help="trace N of timm's models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cold", metavar="MODEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cold:
        _survey(arguments.cold)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    print(f"{'model':<32}{'cold s':>8}{'peak MiB':>10}{'warm s':>8}{'trace s':>9}{'card s':>8}")
    for model in MODELS:
        start = time.perf_counter()
        command = [sys.executable, __file__, "--cold", model]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        cold = time.perf_counter() - start
        warm, tracing, card = _warm(model)
        peak = int(output.split()[-1]) / 2**20
        print(f"{model:<32}{cold:>8.1f}{peak:>10.0f}{warm:>8.2f}{tracing:>9.2f}{card:>8.3f}")
    if arguments.zoo:
        zoo(arguments.zoo, arguments.seed)


def _survey(model: str) -> None:
    import torch

    import memfit

    torch.set_num_threads(1)
    memfit.survey(model)


def _warm(model: str) -> tuple[float, float, float]:
    """Seconds for twelve cards, for one trace, and for one card more."""
    import torch

    from memfit import search
    from memfit.backends.simulated import SimulatedBackend, TraceCache
    from memfit.records import StepOptions
    from memfit.simulation.gpus import find_gpu
    from memfit.workload import TrainingStep

    torch.set_num_threads(1)
    start = time.perf_counter()
    _survey(model)
    warm = time.perf_counter() - start
    traces = TraceCache()

    def answer(name: str) -> float:
        start = time.perf_counter()
        backend = SimulatedBackend(find_gpu(name), traces=traces)
        options = StepOptions(precision=backend.auto_precision, optimizer="adamw")
        step = TrainingStep(subject=model, options=options)
        search.largest(
            lambda batch_size: backend.trial(step, batch_size),
            capacity_bytes=backend.capacity().usable_bytes,
            hint=backend.expected_edge(step),
        )
        return time.perf_counter() - start

    first = answer("rtx3090")
    card = answer("rtx4080")
    return warm, first - card, card


def zoo(num_models: int, seed: int) -> None:
    """Trace a sample of timm's models in mixed precision.

    Args:
        num_models: How many; all if there are fewer.
        seed: Of the sample.
    """
    import timm
    import torch

    from memfit.backends.simulated import trace
    from memfit.records import Precision, StepOptions
    from memfit.simulation.trace import TraceOptions
    from memfit.simulation.workspace import Kernels
    from memfit.workload import TrainingStep

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = timm.list_models()
    names = random.Random(seed).sample(known, min(num_models, len(known)))  # noqa: S311 - a sample
    options = TraceOptions(compute_capability=(8, 0), kernels=Kernels(compute_capability=(8, 0)))
    seconds, operations, failed = [], [], []
    for name in names:
        config = timm.models.get_pretrained_cfg(name)
        num_classes = 1000 if config is not None and config.num_classes == 0 else None
        start = time.perf_counter()
        try:
            step = TrainingStep(
                subject=name,
                options=StepOptions(
                    precision=Precision.AMP_BF16, optimizer="adamw", num_classes=num_classes
                ),
            )
            traced = trace(step, options)
        except Exception as error:  # noqa: BLE001 - every failure is listed
            failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
            continue
        seconds.append(time.perf_counter() - start)
        operations.append(len(traced.tape.later.events))
    print(f"\n{len(seconds)} of {len(names)} models trace ({len(seconds) / len(names):.1%})")
    for reason in failed:
        print(f"  {reason}")
    per_event = [s / n * 1e6 for s, n in zip(seconds, operations, strict=True)]
    print(
        f"seconds a model: median {statistics.median(seconds):.2f}, largest {max(seconds):.1f}; "
        f"microseconds an event: median {statistics.median(per_event):.0f}, "
        f"from {min(per_event):.0f} to {max(per_event):.0f}"
    )


if __name__ == "__main__":
    main()
