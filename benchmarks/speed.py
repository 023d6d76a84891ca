"""How long a simulated answer takes, and how much memory.

    python benchmarks/speed.py [MODEL ...]

For each model, a fresh process on one core simulates a dozen cards. Prints wall-clock seconds and
peak resident bytes of all of it, imports included. Prints the process's own seconds after imports:
for the twelve cards, for one alone (with its trace), for each further one that shares the trace
(the median), and for the twelve cards without cuDNN's answers on disk. Then prints the wall-clock
seconds of the example that plans a course's six configurations, on all cores.
`benchmarks/zoo_traces.py` shows how tracing and replaying grow with a model.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODELS = (
    "resnet50",
    "vit_large_patch16_224",
    "convnext_base",
    "swin_base_patch4_window7_224",
    "efficientnet_b4",
    "nfnet_f4",
)
ROAD_TO_THE_TOP = Path(__file__).parent.parent / "examples" / "road_to_the_top.py"


def main() -> None:
    """Time everything, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--inside", metavar="MODEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(survey(arguments.inside)))
        return
    import timm
    import torch

    print(
        f"torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} CPU cores, one in use, {dt.datetime.now(tz=dt.timezone.utc).date()}"
    )
    print(
        f"{'model':<32}{'wall s':>8}{'MiB':>7}{'12 cards':>10}{'first':>8}{'one more':>10}"
        f"{'no answers':>12}"
    )
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as empty:
            unanswered = _in_a_process(model, XDG_CACHE_HOME=empty)
        _in_a_process(model)  # so that all answers are on disk
        start = time.perf_counter()
        row = _in_a_process(model)
        wall = time.perf_counter() - start
        print(
            f"{model:<32}{wall:>8.1f}{row['peak_bytes'] / 2**20:>7.0f}{row['all_seconds']:>10.2f}"
            f"{row['first_seconds']:>8.2f}{row['more_seconds']:>10.3f}"
            f"{unanswered['all_seconds']:>12.2f}"
        )
    start = time.perf_counter()
    subprocess.run([sys.executable, ROAD_TO_THE_TOP], check=True, stdout=subprocess.DEVNULL)
    print(f"{ROAD_TO_THE_TOP.name:<32}{time.perf_counter() - start:>8.1f}")


def _in_a_process(model: str, **variables: str) -> dict[str, float]:
    """Return what `survey` returns in a fresh process with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, __file__, "--inside", model]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def survey(model: str) -> dict[str, float]:
    """Answer for the common cards, one after another, from as few traces as can be.

    Args:
        model: A timm model.

    Returns:
        The process's seconds for all, for the first and for the last, and its peak resident bytes.
    """
    import torch

    import memfit
    import memfit.api
    from memfit.backends.simulated import SimulatedBackend
    from memfit.backends.traces import TraceCache
    from memfit.cards import COMMON_GPUS, find_gpu
    from memfit.planning import SearchOptions, probe_on
    from memfit.records import Precision, StepOptions
    from memfit.step.training_step import TrainingStep

    torch.set_num_threads(1)
    # A small model first, so that torch and timm do their late imports here.
    memfit.survey("test_vit", gpus=("rtx3090",))
    start = time.process_time()
    memfit.survey(model)
    whole = time.process_time() - start
    options = StepOptions(precision=Precision.AMP_BF16, optimizer="adamw")
    step = TrainingStep(subject=model, options=options)
    bounds = SearchOptions()
    traces = TraceCache()
    seconds = []
    for gpu in (find_gpu(name) for name in COMMON_GPUS):
        if gpu.has_bf16:
            start = time.process_time()
            probe_on(SimulatedBackend(gpu, traces=traces), step, bounds)
            seconds.append(time.process_time() - start)
    return {
        "all_seconds": whole,
        "first_seconds": seconds[0],
        "more_seconds": statistics.median(seconds[1:]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


if __name__ == "__main__":
    main()
