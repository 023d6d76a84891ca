"""Two processes train together: neither hangs, and both have the same gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = (
    "gradients_are_the_whole_batchs",
    "one_that_runs_out_takes_the_other_along",
    "ranks_of_different_cards_keep_their_own_sizes",
    "a_plan_for_different_cards_is_carried_out",
    "everything_is_as_if_it_had_not_run_out",
    "a_failure_on_one_rank_ends_the_step_on_both",
    "nothing_to_average_over_is_said_on_both",
    "ranks_without_targets_take_part",
    "gradients_are_summed_in_buckets",
    "only_the_last_micro_batch_is_synchronised",
    "a_plan_splits_for_a_loop_of_ones_own",
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return what two ranks print, with their errors."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "two_ranks.py"), str(rank), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        return [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_agree(outputs: list[str], case: str) -> None:
    """Each case is in `two_ranks.py`, which says what it checks."""
    for output in outputs:
        assert f"passed {case}\n" in output, output
