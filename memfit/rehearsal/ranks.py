"""One rank of many, rehearsed by a process that is alone."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import Final

from memfit.errors import UsageError

__all__ = ["LoneRank", "launcher_of", "num_launched", "refuse_launcher"]

_GPUS_OF_A_NODE = 8
_NUM_RANKS: Final = re.compile(r"--nproc[-_]per[-_]node(?:=(\d+))?$")
_LAUNCHERS: Final = ("torchrun", "accelerate", "deepspeed", "mpirun", "horovodrun", "srun")


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

    @property
    def note(self) -> str:
        """What a report says of runs that were this rank alone."""
        return (
            f"Each run was rank {self.rank} of {self.world_size} alone. Start the command on each "
            "rank, as torchrun does."
        )


def launcher_of(command: Sequence[str]) -> str | None:
    """Return the word of a command that starts ranks by itself; `None` if there is none."""
    return next(
        (
            word
            for word in command
            if PurePath(word).name in _LAUNCHERS or _NUM_RANKS.fullmatch(word)
        ),
        None,
    )


def refuse_launcher(command: Sequence[str]) -> None:
    """Refuse a command that starts ranks by itself.

    Raises:
        UsageError: It does.
    """
    launcher = launcher_of(command)
    if launcher is not None:
        raise UsageError(
            f"The command starts its ranks itself ({launcher}). Leave out --world-size, or give "
            "the script without the launcher."
        )


def num_launched(command: Sequence[str]) -> int:
    """Return how many ranks torchrun starts here, each with its own GPU; 1 without torchrun."""
    for word, following in itertools.pairwise((*command, "")):
        match = _NUM_RANKS.fullmatch(word)
        if match is not None:
            count = match[1] or following
            return int(count) if count.isdecimal() else 1
    return 1
