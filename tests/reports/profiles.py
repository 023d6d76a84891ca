"""An invented profile that is small enough to be read."""

from __future__ import annotations

import dataclasses

from memfit.profiling.peak import peak_of
from memfit.records import (
    Capacity,
    CardLine,
    Change,
    MemoryBlock,
    MemoryProfile,
    Outcome,
    Phase,
    Precision,
    Role,
    Source,
    StepOptions,
    Timeline,
)
from memfit.units import GIB, MIB

BLOCKS = (
    MemoryBlock(
        role=Role.PARAMETERS,
        module="head",
        operation="model",
        source_line=None,
        requested_bytes=100 * MIB,
        held_bytes=100 * MIB,
        bytes_per_sample=0,
    ),
    MemoryBlock(
        role=Role.INPUTS,
        module="(batch)",
        operation="aten.randn.default",
        source_line=None,
        requested_bytes=20 * MIB,
        held_bytes=20 * MIB,
        born=0,
        died=5,
        bytes_per_sample=5 * MIB,
    ),
    MemoryBlock(
        role=Role.ACTIVATIONS,
        module="stem.conv",
        operation="aten.convolution.default",
        source_line="net.py:12",
        requested_bytes=200 * MIB - 7,
        held_bytes=200 * MIB,
        born=1,
        died=4,
        bytes_per_sample=50 * MIB,
    ),
    MemoryBlock(
        role=Role.GRADIENTS,
        module="head",
        operation="aten.mm.default",
        source_line="net.py:15",
        requested_bytes=100 * MIB,
        held_bytes=100 * MIB,
        born=2,
        died=6,
        bytes_per_sample=0,
    ),
    MemoryBlock(
        role=Role.TEMPORARIES,
        module="stem.conv",
        operation="aten.convolution_backward.default",
        source_line="net.py:12",
        requested_bytes=10 * MIB,
        held_bytes=10 * MIB,
        born=3,
        died=7,
        bytes_per_sample=0,
    ),
)
TIMELINE = Timeline(
    allocated_bytes=tuple(MIB * size for size in (120, 320, 420, 430, 230, 210, 110, 100)),
    reserved_bytes=tuple(MIB * size for size in (130, 330, 440, 440, 440, 440, 440, 440)),
    phases=(
        Phase(name="forward", begin=0, micro_batch=0),
        Phase(name="backward", begin=2, micro_batch=0),
        Phase(name="optimizer", begin=6),
    ),
)
PROFILE = MemoryProfile(
    subject="net",
    device="NVIDIA GeForce RTX 3090",
    source=Source.SIMULATED,
    options=StepOptions(precision=Precision.AMP_BF16, optimizer="adamw"),
    batch_size=4,
    num_micro_batches=1,
    capacity=Capacity(usable_bytes=23 * GIB, total_bytes=24 * GIB, origin="simulated"),
    outcome=Outcome.FITS,
    message=None,
    timeline=TIMELINE,
    peak=peak_of(BLOCKS, TIMELINE, context_bytes=300 * MIB),
    blocks=BLOCKS,
    cards=(
        CardLine(
            gpu="NVIDIA GeForce RTX 3090",
            precision="amp-bf16",
            total_bytes=24 * GIB,
            points=((1, 500 * MIB), (4, 740 * MIB), (500, 30 * GIB)),
            max_batch_size=400,
            max_batch_bytes=24 * GIB - MIB,
        ),
        CardLine(
            gpu="Tesla T4",
            precision="amp-fp16",
            total_bytes=512 * MIB,
            points=((1, 500 * MIB), (4, 740 * MIB), (500, 30 * GIB)),
            max_batch_size=None,
            max_batch_bytes=None,
        ),
    ),
    advice=(
        Change(
            title="Recompute activations in backward",
            how="--grad-checkpointing",
            cost="forward runs twice: about a third more time",
            total_bytes=590 * MIB,
            freed_bytes=150 * MIB,
        ),
    ),
    seconds=1.5,
    torch_version="2.15.0",
)


def with_many_events(num_events: int) -> MemoryProfile:
    """Return a profile with as many events as a large model has."""
    half = num_events // 2
    blocks = tuple(
        MemoryBlock(
            role=Role.ACTIVATIONS if index % 3 else Role.TEMPORARIES,
            module=f"layers.{index % 97}.block.{index % 7}",
            operation="aten.addmm.default",
            source_line=f"net.py:{index % 400}",
            requested_bytes=MIB + index,
            held_bytes=2 * MIB,
            born=index,
            died=num_events - 1 - index,
            bytes_per_sample=index,
        )
        for index in range(half)
    )
    allocated = [2 * MIB * (index + 1) for index in range(half)]
    allocated += [2 * MIB * (half - 1 - index) for index in range(half)]
    timeline = Timeline(
        allocated_bytes=tuple(allocated),
        reserved_bytes=(max(allocated),) * num_events,
        phases=(Phase(name="forward", begin=0), Phase(name="backward", begin=half)),
    )
    return dataclasses.replace(
        PROFILE, timeline=timeline, blocks=blocks, peak=peak_of(blocks, timeline)
    )
