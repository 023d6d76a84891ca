"""Training scripts that are only made up, run on the model of torch's allocator."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from memfit.records import Action, HeldBytes, Outcome, RehearsedProcess, Source, Trial
from memfit.simulation.allocator.caching import AllocatorOutOfMemoryError, CachingAllocator
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.units import KIB

TORCH_VERSION = "2.15.0+cu132"


@dataclasses.dataclass(frozen=True)
class MadeScript:
    """A script that keeps a tensor of each layer until backward, and Adam's two of each weight.

    Args:
        weight_bytes: The bytes of each layer's weight.
        sample_bytes: The bytes of a sample in each layer's output.
        scratch_bytes: The bytes of scratch memory for a sample, in every layer.
        scratch_from: The batch size from which there is scratch memory.
        evaluates_below: Below this batch size the script takes an evaluation between its steps.
    """

    weight_bytes: tuple[int, ...]
    sample_bytes: tuple[int, ...]
    scratch_bytes: int = 0
    scratch_from: int = 1
    evaluates_below: int = 0
    num_steps: int = 4

    def requests(self, batch_size: int) -> Iterator[tuple[Action, int, int] | None]:
        """Yield each request and free as action, id and bytes; `None` where a step has ended."""
        numbers = itertools.count()
        weights = list(zip(numbers, self.weight_bytes, strict=False))
        yield from _taken(weights)
        for step in range(self.num_steps):
            outputs = []
            for size in self.sample_bytes:
                outputs += [(next(numbers), size * batch_size)]
                yield from _taken(outputs[-1:])
                if batch_size >= self.scratch_from:
                    yield from _used((next(numbers), self.scratch_bytes * batch_size))
            gradients = []
            for weight, output in zip(weights[::-1], outputs[::-1], strict=True):
                gradients += [(next(numbers), weight[1])]
                yield from _taken(gradients[-1:])
                yield from _freed([output])
            if not step:
                yield from _taken((next(numbers), size) for _, size in (*weights, *weights))
            yield from _freed(gradients)
            if batch_size < self.evaluates_below:
                seen = [(next(numbers), 3 * KIB * batch_size) for _ in range(2)]
                yield from (*_taken(seen), *_freed(seen))
            yield None

    def run(self, batch_size: int, capacity_bytes: int) -> tuple[Trial, dict[str, Any]]:
        """Run the script on the model of the allocator.

        Returns:
            What it held, and what `memfit.rehearsal.watch.requests` records of it.
        """
        settings = AllocatorSettings.from_environment({}, torch_release=(2, 15))
        allocator = CachingAllocator(capacity_bytes=capacity_bytes, settings=settings)
        clock = itertools.count(1_000_000)
        addresses: dict[int, int] = {}
        trace, step_ends, outcome = [], [], Outcome.FITS
        for request in self.requests(batch_size):
            time_us = next(clock)
            if request is None:
                step_ends.append(time_us * 1000)
                continue
            action, number, num_bytes = request
            try:
                is_served = allocator.carry_out(action, number, num_bytes)
            except AllocatorOutOfMemoryError:
                outcome = Outcome.OUT_OF_MEMORY
                break
            if action is not Action.FREE_COMPLETED and is_served:
                action = Action.ALLOC
                addresses[number] = allocator.address_of(number)
            elif number in addresses:
                trace.append({"action": "free_requested", "addr": addresses[number], "size": 1})
            else:
                continue
            trace.append(
                {
                    "action": action.value,
                    "addr": addresses[number],
                    "size": num_bytes,
                    "time_us": time_us,
                }
            )
        stats = allocator.stats
        trial = Trial(
            batch_size=batch_size,
            outcome=outcome,
            source=Source.REHEARSED,
            peak_requested_bytes=stats.peak_requested_bytes,
            peak_allocated_bytes=stats.peak_allocated_bytes,
            peak_reserved_bytes=stats.peak_reserved_bytes,
            num_alloc_retries=stats.num_alloc_retries,
            num_iterations=len(step_ends),
        )
        return trial, {"step_ends_ns": step_ends, "traces": [[], trace]}


def _taken(blocks: Iterable[tuple[int, int]]) -> Iterator[tuple[Action, int, int]]:
    return ((Action.ALLOC, *block) for block in blocks)


def _freed(blocks: Iterable[tuple[int, int]]) -> Iterator[tuple[Action, int, int]]:
    return ((Action.FREE_COMPLETED, *block) for block in blocks)


def _used(block: tuple[int, int]) -> Iterator[tuple[Action, int, int]]:
    """Scratch memory, without which cuDNN takes another plan. torch asks for none of no bytes."""
    if block[1]:
        yield Action.ALLOC_IF_ROOM, *block
        yield Action.FREE_COMPLETED, *block


def process_of(trial: Trial) -> RehearsedProcess:
    """Return the record of the process that ran a script on the second device."""
    return made_process(
        HeldBytes(
            requested_bytes=trial.peak_requested_bytes or 0,
            allocated_bytes=trial.peak_allocated_bytes or 0,
            reserved_bytes=trial.peak_reserved_bytes or 0,
        ),
        device_index=1,
        num_alloc_retries=trial.num_alloc_retries,
        num_steps=trial.num_iterations,
    )


def made_process(
    peak: HeldBytes, *, num_steps: int, device_index: int = 0, num_alloc_retries: int = 0
) -> RehearsedProcess:
    """Return the record of a process of which only the peak and the steps matter."""
    return RehearsedProcess(
        process=1,
        rank=None,
        num_ranks=None,
        device_index=device_index,
        torch_version=TORCH_VERSION,
        peak=peak,
        num_alloc_retries=num_alloc_retries,
        num_steps=num_steps,
        steps=(),
        phases=(),
        reads=(),
        shortages=(),
        has_settled=True,
        follows_modules=True,
        message=None,
    )
