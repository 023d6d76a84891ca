"""Where the memory of a training step goes: from a simulation, or from the device's own record.

`attribution` and `watching` note what each allocation is for, while the step is traced or runs.
`peak` adds the bytes up. A profile says nothing about time.
"""

from __future__ import annotations

from memfit.profiling.advice import advise
from memfit.profiling.card_lines import card_lines
from memfit.profiling.measured import profile_current_gpu, profile_device
from memfit.profiling.simulated import profile_gpu
from memfit.profiling.snapshot import Profiled

__all__ = [
    "Profiled",
    "advise",
    "card_lines",
    "profile_current_gpu",
    "profile_device",
    "profile_gpu",
]
