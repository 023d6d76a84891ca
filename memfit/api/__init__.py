"""The public functions: each wires a workload, a backend and what asks of them together.

No logic of its own: what is trained is `memfit.workload`'s, where it runs `memfit.backends`', which
batch size is `memfit.search`'s.
"""

from __future__ import annotations

from memfit.api.probing import estimate, probe, survey
from memfit.api.profiling import profile
from memfit.api.steps import has_gpu
from memfit.api.verifying import verify

__all__ = ["estimate", "has_gpu", "probe", "profile", "survey", "verify"]
