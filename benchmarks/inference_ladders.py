"""timm's loop over batch sizes, rehearsed: each attempt leaves behind what `ladders.py` describes.

With `--torchcompile`, each attempt forgets what was compiled (`torch._dynamo.reset`) once its own
model is made, and compiles for its own batch size: Inductor, with every option at its default.

Source: `BenchmarkRunner` and `_try_run` in timm's benchmark.py (1.0.9 and 1.0.24).
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from inference_loops import InHalf
from ladders import CHANNELS, Images

from memfit.step.compiling import CompiledModel
from memfit.step.training_step import TrainingStep
from memfit.step.unfilled import UnfilledWeights

__all__ = ["Attempt", "Walk", "rehearsed_rung"]

_NUM_ITERATIONS = 4


@dataclasses.dataclass(frozen=True)
class Walk:
    """Which part of a ladder is walked.

    The first attempt is at `start`, in an empty process. While nothing has failed, the next one is
    a rung higher. After a failure, they go down as timm's loop does, in what the failed ones left
    behind. So from the rung above the edge, two attempts decide as the whole ladder does.

    Args:
        rungs: The batch sizes, in the order of timm's loop.
        start: Where in it the first attempt is.
        most_attempts: The walk ends after so many; `None` for no limit.
        most_seconds: It ends after so long on a core, in the middle of an attempt; `None` for no
            limit. What else the machine does is not counted.
    """

    rungs: Sequence[int]
    start: int = 0
    most_attempts: int | None = None
    most_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Attempt:
    """How an attempt ended.

    Args:
        batch_size: The batch size.
        peak_reserved_bytes: The most that was reserved, with what the attempt before left.
        error: Why it failed; `None` if it fits.
        seconds: How long it took on a core, here.
    """

    batch_size: int
    peak_reserved_bytes: int
    error: str | None
    seconds: float


class _Bench:
    """One batch size: a new model on the card, and then its images and forward passes."""

    def __init__(self, step: TrainingStep, batch_size: int) -> None:
        # The card computes nothing, so the weights can be anything.
        with UnfilledWeights():
            prepared = step.prepare(torch.device("cuda"))
        prepared.begin()
        self._model = prepared.model
        if step.options.compile:
            self._model = CompiledModel(prepared.model).module
        self._batch_size = batch_size
        self._no_grad = step.options.no_grad

    def run(self, images: Images, most_samples: int | None) -> None:
        """Run a few forward passes, as timm's `InferenceBenchmarkRunner.run` does."""
        with torch.no_grad() if self._no_grad else torch.inference_mode():
            shape = self._batch_size, CHANNELS, images.size, images.size
            made = torch.randn(shape, device="cuda")
            if images.is_last:
                made = made.contiguous(memory_format=torch.channels_last)
            self._images = made
            if most_samples is not None and self._batch_size > most_samples:
                raise RuntimeError("an operator refuses so many samples")
            for _ in range(_NUM_ITERATIONS):
                with torch.autocast("cuda", torch.float16):
                    self._model(self._images)


def rehearsed_rung(
    _backend: Any,
    step: TrainingStep,
    walk: Walk,
    images: Images,
    most: int | None,
    in_half: InHalf,
) -> tuple[int | None, tuple[Attempt, ...]]:
    """Return the batch size at which timm's loop ends on this process's card, and the attempts.

    It is 0 if the smallest one fails, and `None` if the walk ended before the edge was found.
    """
    in_half.set()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    attempts: list[Attempt] = []
    at = walk.start
    with _limited(walk.most_seconds):
        while at < len(walk.rungs) and len(attempts) != walk.most_attempts:
            start = time.process_time()
            error = None
            try:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                bench = _Bench(step, walk.rungs[at])
                bench.run(images, most)
            except RuntimeError as refusal:
                error = str(refusal)[:300]
            peak = torch.cuda.memory_stats()["reserved_bytes.all.peak"]
            attempts.append(
                Attempt(walk.rungs[at], peak, error, round(time.process_time() - start, 1))
            )
            if error is not None:
                at += 1
                continue
            has_failed = any(attempt.error is not None for attempt in attempts)
            if at == 0 or has_failed:
                return walk.rungs[at], tuple(attempts)
            at -= 1
            # timm's loop was not here before the rung above: nothing is left behind.
            del bench
            torch.compiler.reset()
            gc.collect()
    return (0 if at == len(walk.rungs) else None), tuple(attempts)


class _OutOfTime(BaseException):
    """Not an Exception, because the compiler makes its own error of each of those."""


@contextlib.contextmanager
def _limited(seconds: float | None) -> Iterator[None]:
    """Leave the block after so many seconds on a core."""

    def give_up(*_: Any) -> None:
        raise _OutOfTime

    before = signal.signal(signal.SIGPROF, give_up)
    # Again and again, because an exception in a callback of C code can get lost.
    signal.setitimer(signal.ITIMER_PROF, seconds or 0, 5)
    try:
        yield
    except _OutOfTime:
        pass
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
