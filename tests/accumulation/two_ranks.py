"""One of two ranks that train together; started by `test_ranks.py`, one process for each.

    python two_ranks.py RANK FOLDER

Each case below runs on both ranks. The ranks meet in every collective, and each checks its results.
If one rank does not come, the other ends with the process group's timeout.
"""

from __future__ import annotations

import contextlib
import copy
import datetime as dt
import functools
import gc
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from accumulation.parts import (
    Failing,
    GradientRecorder,
    Restless,
    full_batch_gradients,
    out_of_memory,
    plan_of,
    plan_of_cards,
    relative_error,
)
from accumulation.ranks_parts import (
    WEIGHTS,
    Net,
    assert_same_on_both,
    data,
    loss_over,
    mean_over_all,
    together,
    whole_batch,
    whole_loss_of,
)
from memfit import Accumulator, micro_batches
from memfit.accumulation import ranks
from memfit.errors import DoesNotFitError, RankFailedError, UsageError, WorkloadError
from memfit.integrations import lines_for

RANK = int(sys.argv[1]) if len(sys.argv) > 1 else 0
TIMEOUT = dt.timedelta(seconds=45)
BOUND = 1e-10


def gradients_are_the_whole_batchs() -> None:
    """Shares and counts are uneven, and one rank or none uses a part; recovery is on or off."""
    for recover in (True, False):
        for over, weight in WEIGHTS.items():
            reference, shares, expected = whole_batch((11, 6), over=over)
            whole = mean_over_all(reference, shares, over=over).item()
            model = together(copy.deepcopy(reference), find_unused_parameters=not recover)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            seen = GradientRecorder(optimizer)
            accumulator = Accumulator(
                model, optimizer, 4, loss=loss_over(over), weight=weight, recover=recover
            )
            loss = accumulator.step(shares[RANK])
            assert relative_error(seen.steps[0], expected) < BOUND, (recover, over)
            assert abs(float(loss) - whole) < 1e-10 * abs(whole)
            assert_same_on_both(seen.steps[0])


def one_that_runs_out_takes_the_other_along() -> None:
    """It runs out in forward or backward, in the first or the last micro-batch."""
    for failing, where in ((0, "forward"), (1, "forward"), (1, "backward"), (2, "backward")):
        reference, shares, expected = whole_batch((12, 12))
        model = together(copy.deepcopy(reference))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen = GradientRecorder(optimizer)
        calls = {failing} if RANK == 1 else set()
        accumulator = Accumulator(
            model,
            optimizer,
            4,
            loss=Failing(calls, out_of_memory, where),
            weight=WEIGHTS["targets"],
        )
        accumulator.step(shares[RANK])
        assert accumulator.micro_batch_size == 2
        assert relative_error(seen.steps[0], expected) < BOUND
        assert_same_on_both(seen.steps[0])


def ranks_of_different_cards_keep_their_own_sizes() -> None:
    """Shares and micro-batches differ, and only the rank that runs out takes smaller ones."""
    reference, shares, expected = whole_batch((11, 6))
    for calls, sizes in ((set(), (4, 2)), ({1} if RANK == 1 else set(), (4, 1))):
        model = together(copy.deepcopy(reference))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen = GradientRecorder(optimizer)
        accumulator = Accumulator(
            model,
            optimizer,
            (4, 2)[RANK],
            loss=Failing(calls, out_of_memory, "backward"),
            weight=WEIGHTS["targets"],
        )
        accumulator.step(shares[RANK])
        assert accumulator.micro_batch_size == sizes[RANK]
        assert relative_error(seen.steps[0], expected) < BOUND
        assert_same_on_both(seen.steps[0])


def a_plan_for_different_cards_is_carried_out() -> None:
    """By the Accumulator, by a loop of one's own, and by the two loops that are emitted."""
    plan = plan_of_cards((4, 4, 3), (2, 2, 2))
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 4)).double()
    x, y = torch.randn(17, 5).double(), torch.randint(4, (17,))
    expected: list[torch.Tensor | None] = list(
        torch.autograd.grad(F.cross_entropy(reference(x), y), list(reference.parameters()))
    )
    mine = slice(0, 11) if RANK == 0 else slice(11, 17)
    assert plan.share_of(RANK) == len(x[mine])
    model = together(copy.deepcopy(reference))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = GradientRecorder(optimizer)
    accumulator = Accumulator(model, optimizer, plan, loss=F.cross_entropy)
    accumulator.step((x[mine], y[mine]))
    assert accumulator.micro_batch_size == (4, 2)[RANK]
    assert relative_error(seen.steps[0], expected) < BOUND
    model = together(copy.deepcopy(reference))
    micros = micro_batches(plan, (x[mine], y[mine]))
    assert tuple(micro.num_samples for micro in micros) == plan.ranks[RANK].micro_batch_sizes
    for micro in micros:
        with contextlib.nullcontext() if micro.is_last else model.no_sync():
            (F.cross_entropy(model(micro.batch[0]), micro.batch[1]) * micro.weight).backward()
    assert relative_error([p.grad for p in model.parameters()], expected) < BOUND
    loader, *loops = lines_for(plan, "pytorch").split("\n\n# ")
    for loop in loops:
        model = together(copy.deepcopy(reference))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen = GradientRecorder(optimizer)
        names = {"model": model, "optimizer": optimizer, "loss_fn": F.cross_entropy}
        names["dataset"] = TensorDataset(x, y)
        exec(f"{loader}\n\n# {loop}", names)  # noqa: S102 - that is the test
        assert len(seen.steps) == 1
        # The loop by hand divides whole numbers of the device, which gives float32.
        assert relative_error(seen.steps[0], expected) < 1e-6
    with raises(UsageError, "the cards of this plan take different ones"):
        lines_for(plan, "timm")


def everything_is_as_if_it_had_not_run_out() -> None:
    """This includes shared buffers and random states, bit for bit, over several steps."""
    finals = []
    for micro, calls in ((8, {1} if RANK == 1 else set()), (4, set())):
        torch.manual_seed(RANK)
        model = Restless()
        model.load_state_dict(distributed_state(model))
        ddp = together(model)
        optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)
        accumulator = Accumulator(
            ddp, optimizer, micro, loss=Failing(calls, out_of_memory, "backward")
        )
        torch.manual_seed(10 + RANK)
        random.seed(RANK)
        np.random.seed(RANK)
        # The first micro-batch of the first step passes on both ranks, the second runs out.
        batch = torch.randn(16, 6), torch.randint(3, (16,))
        for _ in range(3):
            accumulator.step(batch)
        finals.append([*model.state_dict().values(), torch.get_rng_state()])
        assert_same_on_both(list(model.parameters()))
        assert accumulator.micro_batch_size == 4
        # After any synchronised step, the next forward shares the first rank's buffers.
        assert ddp.require_forward_param_sync
    assert all(torch.equal(one, other) for one, other in zip(*finals, strict=True))


def distributed_state(model: nn.Module) -> dict[str, torch.Tensor]:
    states = [model.state_dict()]
    distributed.broadcast_object_list(states, src=0)
    return states[0]


@contextlib.contextmanager
def raises(kind: type[Exception], says: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert says in str(error), error
    else:
        raise AssertionError(f"no {kind.__name__}")


def a_failure_on_one_rank_ends_the_step_on_both() -> None:
    """It is a bug, a wrong batch, or too little memory for any micro-batch; then both go on."""
    model = together(Net().double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shares, _ = data((6, 6))

    def bug() -> Exception:
        return KeyError("a bug")

    accumulator = Accumulator(
        model,
        optimizer,
        2,
        loss=Failing(set(), bug, "forward"),
        weight=WEIGHTS["targets"],
    )
    failures: tuple[tuple[set[int], Callable[[], Exception], type[Exception], str], ...] = (
        ({1}, bug, KeyError, "a bug"),
        (set(range(99)), out_of_memory, DoesNotFitError, "micro-batches of 1"),
    )
    for calls, make_error, own, says in failures:
        accumulator._loss = Failing(calls if RANK == 1 else set(), make_error, "forward")
        with raises(own, says) if RANK == 1 else raises(RankFailedError, "on another rank"):
            accumulator.step(shares[RANK])
        assert accumulator.micro_batch_size == 2
    mismatched = (torch.zeros(2, 5), torch.zeros(3)) if RANK == 1 else shares[RANK]
    differs = raises(WorkloadError, "dimensions differ")
    with differs if RANK == 1 else raises(RankFailedError, "on another rank"):
        accumulator.step(mismatched)
    accumulator._loss = Failing(set(), bug, "forward")
    accumulator.step(shares[RANK])
    assert_same_on_both(list(model.parameters()))


def nothing_to_average_over_is_said_on_both() -> None:
    """The weights of all ranks sum to 0."""
    model = together(Net().double())
    accumulator = Accumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        2,
        loss=F.cross_entropy,
        weight=lambda batch: 0,
    )
    with raises(WorkloadError, "nothing to average over"):
        accumulator.step(data((6, 6))[0][RANK])


def ranks_without_targets_take_part() -> None:
    """The other rank waits for their gradients, if the last micro-batch or all lack targets."""
    for recover in (True, False):
        for num_valid in (0, 3):
            torch.manual_seed(0)
            reference = nn.Linear(5, 4).double()
            shares, _ = data((12, 12))
            shares[1][1][num_valid:] = -100
            optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
            x, y = (torch.cat(parts) for parts in zip(*shares, strict=True))
            expected = full_batch_gradients(
                reference, optimizer, functools.partial(whole_loss_of, reference, x, y)
            )
            model = together(copy.deepcopy(reference))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            seen = GradientRecorder(optimizer)
            accumulator = Accumulator(
                model,
                optimizer,
                4,
                loss=F.cross_entropy,
                weight=WEIGHTS["targets"],
                recover=recover,
            )
            accumulator.step(shares[RANK])
            assert relative_error(seen.steps[0], expected) < BOUND


def gradients_are_summed_in_buckets() -> None:
    """They are larger than a bucket, or have other strides or types."""
    ranks._BUCKET_BYTES = 64
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 40)).double()
        model.to(memory_format=torch.channels_last)
        reference = copy.deepcopy(model)
        ddp = together(model)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        seen = GradientRecorder(optimizer)
        torch.manual_seed(1)
        x = torch.randn(2, 3, 3, 4, 4).double()
        Accumulator(ddp, optimizer, 2, loss=lambda out: out.square().mean()).step(x[RANK])
        expected = full_batch_gradients(
            reference,
            torch.optim.SGD(reference.parameters(), lr=0.1),
            lambda: reference(x.flatten(0, 1)).square().mean(),
        )
        assert relative_error(seen.steps[0], expected) < BOUND
    finally:
        ranks._BUCKET_BYTES = 25 * 1024**2


def only_the_last_micro_batch_is_synchronised() -> None:
    """Without recovery the model sums gradients once in a step; with it the Accumulator does."""
    for recover, expected in ((False, [False, False, True]), (True, [False] * 3)):
        seen: list[bool] = []
        model = together(nn.Linear(5, 4).double())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss(
            outputs: torch.Tensor,
            targets: torch.Tensor,
            seen: list[bool] = seen,
            model: DistributedDataParallel = model,
        ) -> torch.Tensor:
            seen.append(model.require_backward_grad_sync)
            return F.cross_entropy(outputs, targets)

        accumulator = Accumulator(
            model, optimizer, 4, loss=loss, recover=recover, weight=WEIGHTS["targets"]
        )
        accumulator.step(data((12, 12))[0][RANK])
        assert seen == expected
        assert_same_on_both(list(model.parameters()))


def a_plan_splits_for_a_loop_of_ones_own() -> None:
    """Weights count over both ranks, and fit gradients that are averaged over the ranks."""
    torch.manual_seed(0)
    reference = nn.Linear(5, 4).double()
    model = together(copy.deepcopy(reference))
    shares, _ = data((9, 6))
    plan = plan_of(15, 4, world_size=2)
    for micro in micro_batches(plan, shares[RANK], weight=WEIGHTS["targets"]):
        x, y = micro.batch
        with contextlib.nullcontext() if micro.is_last else model.no_sync():
            loss = F.cross_entropy(model(x), y, reduction="sum") / (y != -100).sum().clamp(min=1)
            (loss * micro.weight).backward()
    x, y = (torch.cat(parts) for parts in zip(*shares, strict=True))
    expected = torch.autograd.grad(F.cross_entropy(reference(x), y), list(reference.parameters()))
    ours = [parameter.grad for parameter in model.parameters()]
    assert relative_error(ours, list(expected)) < BOUND
    with raises(UsageError, "for 3 ranks, and there are 2"):
        micro_batches(plan_of(15, 4, world_size=3), shares[RANK])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for world_size, says in ((3, "is for 3 ranks"), (1, "is for 1 rank, but")):
        other = plan_of(15, 4, world_size=world_size)
        with raises(UsageError, says):
            Accumulator(model, optimizer, other, loss=F.cross_entropy)
    alone = plan_of(15, 4, world_size=2)
    own = torch.optim.SGD(reference.parameters(), lr=0.1)
    with raises(UsageError, "come from 1. Plan with world_size=1, or wrap"):
        Accumulator(reference, own, alone, loss=F.cross_entropy)


CASES = (
    gradients_are_the_whole_batchs,
    one_that_runs_out_takes_the_other_along,
    ranks_of_different_cards_keep_their_own_sizes,
    a_plan_for_different_cards_is_carried_out,
    everything_is_as_if_it_had_not_run_out,
    a_failure_on_one_rank_ends_the_step_on_both,
    nothing_to_average_over_is_said_on_both,
    ranks_without_targets_take_part,
    gradients_are_summed_in_buckets,
    only_the_last_micro_batch_is_synchronised,
    a_plan_splits_for_a_loop_of_ones_own,
)


def main() -> None:
    """Run every case, and say which passed."""
    torch.set_num_threads(1)
    gc.freeze()  # the collector need not search what torch has loaded after each failed attempt
    meeting = Path(sys.argv[2], "meeting").as_uri()
    distributed.init_process_group(
        "gloo", init_method=meeting, rank=RANK, world_size=2, timeout=TIMEOUT
    )
    for case in CASES:
        case()
        distributed.barrier()
        print("passed", case.__name__, flush=True)  # noqa: T201 - to `test_ranks.py`
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
