"""Where the memory of a training step goes: from a simulation, or from the device's own record.

What each allocation is for is noted while the step runs or is traced (`attribution`, `watching`);
`peak` adds it up. It says nothing of time.
"""

from __future__ import annotations

from memfit.profiling.measured import DeviceProfile, profile_device
from memfit.profiling.simulated import SimulatedProfile, profile_gpu

__all__ = ["DeviceProfile", "SimulatedProfile", "profile_device", "profile_gpu"]
