"""A memory profile on a terminal."""

from __future__ import annotations

import dataclasses

from rich.console import Console

from memfit.records import MemoryProfile, Outcome
from memfit.reports.profile import render
from reports.profiles import PROFILE, with_many_events

EXPECTED = """\
net on NVIDIA GeForce RTX 3090, 4 samples
amp-bf16 · adamw · simulated

Peak 440 MiB reserved; 740 MiB of 24.0 GiB with the 300 MiB context, in backward
PPPPPPPPPPPGGGGGGGGGGAAAAAAAAAAAAAAAAAAAAAIITFXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXX

X  CUDA context                     300 MiB  40.5%
A  activations saved for backward   200 MiB  27.0%  50.0 MiB a sample
P  parameters                       100 MiB  13.5%
G  gradients                        100 MiB  13.5%
I  inputs                          20.0 MiB   2.7%   5.0 MiB a sample
T  temporaries                     10.0 MiB   1.4%
F  cached by the allocator, free   10.0 MiB   1.4%
S  allocator rounding                   7 B   0.0%
Every sample brings 55.0 MiB to the peak; 210 MiB are there whatever the batch
size.

Over the step
▂▂▂▂▂▂▂▂▂▂▆▆▆▆▆▆▆▆▆▆███████████████████▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▄▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂▂
│forward           │backward                              │optimizer
allocated, from 100 MiB to 430 MiB

Modules at the peak
├── (CUDA context)  300 MiB  40.5%
├── stem  210 MiB  28.4%
│   └── stem.conv  210 MiB  28.4%
├── head  200 MiB  27.0%
├── (batch)  20.0 MiB  2.7%
├── (cached, free)  10.0 MiB  1.4%
└── (rounding)  7 B  0.0%

Largest blocks at the peak, by line
     in all  blocks   largest  operation          line
A   200 MiB       1   200 MiB  convolution        net.py:12
G   100 MiB       1   100 MiB  mm                 net.py:15
P   100 MiB       1   100 MiB  model              head
I  20.0 MiB       1  20.0 MiB  randn              (batch)
T  10.0 MiB       1  10.0 MiB  convolution_back…  net.py:12

Cards (simulated), with the CUDA context
GPU                      precision  largest batch     at 4      left
NVIDIA GeForce RTX 3090  amp-bf16             400  740 MiB  23.3 GiB
Tesla T4                 amp-fp16            none  740 MiB  -228 MiB

What would free most at the peak (simulated)
  frees  change
150 MiB  Recompute activations in backward (--grad-checkpointing)
         590 MiB with it; forward runs twice: about a third more time

Simulated, not measured, in 1.5 s with torch 2.15.0; 5 blocks, 8 events.
"""


def printed(profile: MemoryProfile) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(render(profile))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def test_the_whole_report() -> None:
    """Everything can be read without colour, in 80 columns."""
    assert printed(PROFILE) == EXPECTED


def test_long_names_keep_to_80_columns() -> None:
    """Modules, operations and lines are shortened and do not wrap."""
    blocks = tuple(
        dataclasses.replace(
            block, module="stages." * 12 + "conv", operation="x" * 60, source_line="a/" * 40
        )
        for block in PROFILE.blocks
    )
    text = printed(dataclasses.replace(PROFILE, blocks=blocks))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" in text


def test_what_does_not_fit_says_so_first() -> None:
    """The sentence comes before the figures."""
    sentence = "It does not fit: 3 GiB more than there is."
    text = printed(dataclasses.replace(PROFILE, outcome=Outcome.OUT_OF_MEMORY, message=sentence))
    assert text.index(sentence) < text.index("Peak")


def test_a_long_step_is_one_line() -> None:
    """Thousands of events become a sparkline of 78 characters that shows the peak."""
    text = printed(with_many_events(20_000))
    (line,) = (line for line in text.splitlines() if "█" in line)
    assert len(line) == 78
    assert line.index("█") in range(30, 40)
