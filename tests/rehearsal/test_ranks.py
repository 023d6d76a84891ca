"""Ranks: how many a command starts by itself."""

from __future__ import annotations

import pytest

from memfit.errors import UsageError
from memfit.rehearsal.ranks import LoneRank, launcher_of, num_launched, refuse_launcher


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("python", "train.py"), 1),
        (("torchrun", "--nproc-per-node", "4", "train.py"), 4),
        (("torchrun", "--nproc_per_node=2", "train.py"), 2),
        (("torchrun", "--nproc-per-node", "gpu", "train.py"), 1),
    ],
)
def test_ranks_of_a_command(command: tuple[str, ...], expected: int) -> None:
    """Each of torchrun's ranks takes its own card."""
    assert num_launched(command) == expected


def test_a_launcher_is_refused_beside_one_rank() -> None:
    """It would start the ranks, and each would believe that it is alone."""
    assert launcher_of(("python", "train.py")) is None
    for command in (("/opt/bin/torchrun", "train.py"), ("accelerate", "launch", "train.py")):
        with pytest.raises(UsageError, match=f"starts its ranks itself .{command[0]}."):
            refuse_launcher(command)


def test_a_lone_rank_says_what_it_is() -> None:
    """The sentence stands below the figures."""
    assert "rank 3 of 4 alone" in LoneRank(rank=3, world_size=4).note
