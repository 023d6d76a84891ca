"""Many questions at once: models by pattern, in a pool of processes or on a Ray cluster.

A sweep asks about many models and cards. A choice ranks the models that fit one card. Each question
is a task. `memfit.api` answers it in a worker process. Finished answers go to a journal, so that an
interrupted sweep goes on where it stopped.
"""

from __future__ import annotations

from memfit.sweeping.choosing import choose
from memfit.sweeping.running import sweep

__all__ = ["choose", "sweep"]
