"""What operators take from the allocator is what torch's own CUDA code takes, in the same order."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from operator_cases import CASES, run

from memfit._torch_private import dispatched
from memfit.backends.traces import trace_options
from memfit.cards import Gpu, find_gpu
from memfit.records import Action, Event, Precision
from memfit.simulation.needs import NeedEvent
from memfit.simulation.tracing.autocast import functional_layer_open
from memfit.simulation.tracing.recorder import PLANS_TRIED, Recorder
from memfit.simulation.tracing.reductions import reduction
from memfit.simulation.tracing.scripts import Workspace
from memfit.simulation.tracing.semantics import CudaSemantics, MetaPrecision, foreach_on_meta

CARDS = ("RTX 3090", "H100", "B200")
Stretches = list[list[tuple[int, int]]]
# The allocator rounds every request up to this.
GRANULARITY_BYTES = 512


@pytest.fixture(scope="module")
def real(run_rehearsed: Callable[[Path, str], Any]) -> Callable[[str], dict[str, Stretches]]:
    """Return what all cases ask for on a rehearsed card."""
    script = Path(__file__).with_name("operator_cases.py")

    @functools.cache
    def on(card: str) -> dict[str, Stretches]:
        found: dict[str, Stretches] = run_rehearsed(script, card)
        return found

    return on


def simulated(name: str, gpu: Gpu) -> Stretches:
    """Return what a case asks for in a trace."""
    options = trace_options(gpu)
    recorder = Recorder(options.kernels, None)
    stretches: list[list[Event]] = []
    semantics = CudaSemantics(MetaPrecision(Precision.FP32).autocast, options.choose_attention)
    with contextlib.ExitStack() as stack:
        stack.callback(recorder.close)
        stack.enter_context(foreach_on_meta(enabled=True))
        stack.enter_context(functional_layer_open())
        stack.enter_context(semantics)
        stack.enter_context(dispatched(recorder.handle))
        run(name, torch.device("meta"), lambda: stretches.append(recorder.take()))
    sizes: dict[int, int] = {}
    found: Stretches = []
    # The events of a stretch are taken where the next one begins.
    for events in (*stretches[1:], []):
        found.append([])
        for event in events:
            if event.origin == PLANS_TRIED:  # only with cudnn.benchmark
                continue
            if event.action is Action.FREE_COMPLETED:
                if num_bytes := sizes.pop(event.id, 0):
                    found[-1].append((-1, num_bytes))
            elif num_bytes := _bytes_of(event, gpu):
                sizes[event.id] = num_bytes
                found[-1].append((1, num_bytes))
    return found


def _bytes_of(event: Event, gpu: Gpu) -> int:
    return event.need.on(gpu) if isinstance(event, NeedEvent) else event.num_bytes


@pytest.mark.rehearses
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", CASES)
def test_an_operator_asks_for_what_torch_asks_for(
    name: str, card: str, real: Callable[[str], dict[str, Stretches]]
) -> None:
    """Every request and every free of every stretch is the same, to the allocator's rounding."""
    rounded = [
        [
            [(sign, -(-num_bytes // GRANULARITY_BYTES)) for sign, num_bytes in stretch]
            for stretch in side
        ]
        for side in (simulated(name, find_gpu(card)), real(card)[name])
    ]
    assert rounded[0][:-1] == rounded[1][:-1]


@pytest.mark.parametrize(("gpu", "num_blocks"), [("t4", 80), ("rtx3090", 246), ("h100", 489)])
def test_a_reduction_follows_the_card(gpu: str, num_blocks: int) -> None:
    """A long sum is shared by as many blocks as a card runs at once, or as it has work for."""
    script = reduction(torch.empty(4_000_000, device="meta"), ())
    (buffer,) = (line for line in script if isinstance(line, Workspace) and "sums" in line.name)
    assert buffer.need is not None
    assert buffer.need.on(find_gpu(gpu)) == 4 * num_blocks
