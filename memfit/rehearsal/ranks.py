"""One rank of many, rehearsed by a process that is alone."""

from __future__ import annotations

import dataclasses

from memfit.errors import UsageError

__all__ = ["LoneRank"]

_GPUS_OF_A_NODE = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoneRank:
    """A rank whose other ranks have no process.

    Args:
        rank: The rank, from 0.
        world_size: The number of ranks.
        num_gpus: The number of GPUs of its node; `None` for one for each rank, at most 8.

    Raises:
        UsageError: There is no such rank, or no such number.
    """

    rank: int
    world_size: int
    num_gpus: int | None = None

    def __post_init__(self) -> None:
        """Refuse a rank that is not in the world."""
        if self.world_size < 1:
            raise UsageError(f"--world-size must be at least 1, not {self.world_size}.")
        if not 0 <= self.rank < self.world_size:
            raise UsageError(
                f"There is no rank {self.rank} in a world of {self.world_size}: "
                f"ranks are 0 to {self.world_size - 1}."
            )

    @property
    def gpus_of_node(self) -> int:
        """The number of GPUs that the rank sees."""
        return self.num_gpus or min(self.world_size, _GPUS_OF_A_NODE)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that torchrun sets for a rank.

        Source: "Environment Variables" in the documentation of torchrun.
        """
        node, local_rank = divmod(self.rank, self.gpus_of_node)
        local_world_size = min(self.gpus_of_node, self.world_size)
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(local_rank),
            "GROUP_RANK": str(node),
            "ROLE_RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(local_world_size),
            "ROLE_WORLD_SIZE": str(self.world_size),
            "GROUP_WORLD_SIZE": str(-(-self.world_size // self.gpus_of_node)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29500",
            # Libraries ask for this one to know whether torchrun started the process.
            "TORCHELASTIC_RUN_ID": "memfit",
            # NCCL's monitor would look into the store of this process, and wait for Python's lock
            # while Python waits for the monitor's end.
            "TORCH_NCCL_ENABLE_MONITORING": "0",
        }
