"""NCCL on a rehearsed card: one rank of many alone, and ranks with a process each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from memfit.cards import find_gpu
from memfit.rehearsal.activate import rehearsed_environment

from .conftest import Rehearsed

_ONE_OF_EIGHT = """
import gc
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
torch.cuda.set_device(0)
options = {"device_id": torch.device("cuda:0")}
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=8, **options)

def on_device(*values):
    return torch.tensor(values).cuda()
value = on_device(3, 4)
gathered = [torch.zeros(2, dtype=torch.int64, device="cuda") for _ in range(8)]
dist.all_gather(gathered, value)
summed, halves = value.clone(), torch.tensor([1.5, -0.1]).half().cuda()
brain = torch.tensor([1.5, 100.0]).bfloat16().cuda()
dist.all_reduce(summed)
dist.all_reduce(halves)
dist.all_reduce(brain)
least = value.clone()
dist.all_reduce(least, op=dist.ReduceOp.MIN)
part = torch.zeros(1, device="cuda")
dist.reduce_scatter_tensor(part, torch.arange(8.0).cuda())
every_other = dist.new_group([0, 2, 4, 6])
of_four = torch.zeros(8, dtype=torch.int64, device="cuda")
dist.all_gather_into_tensor(of_four, value, group=every_other)

def current():
    gc.collect()
    return torch.cuda.memory_stats()["requested_bytes.all.current"]

def held(wrap):
    empty = current()
    model = wrap(layers())
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.zeros(16, 3, 32, 32, device="cuda")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return current() - empty

def layers():
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Flatten(),
                         nn.Linear(64 * 900, 200)).cuda()
def replicate(model):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(model, device_ids=[0])

def shard(model):
    fully_shard(model[3])
    return fully_shard(model)
# Some releases keep the BLAS's workspaces, of each thread one.
layers()(torch.zeros(16, 3, 32, 32, device="cuda")).sum().backward()
plain, sharded, replicated = held(lambda model: model), held(shard), held(replicate)
answer(
    gathered=[t.tolist() for t in gathered], summed=summed.tolist(), halves=halves.tolist(),
    brain=brain.tolist(), least=least.tolist(), part=part.tolist(), of_four=of_four.tolist(),
    plain=plain, replicated=replicated, sharded=sharded,
)
dist.destroy_process_group()
"""

_RANK = """
import os, sys, torch
import torch.distributed as dist
rank = int(os.environ["LOCAL_RANK"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl")
if rank == 1 and "full" in sys.argv:
    kept = torch.empty(torch.cuda.mem_get_info()[0] - (64 << 20), dtype=torch.uint8, device="cuda")
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.LazyLinear(4))
model = model.cuda()
model(torch.zeros(1, 3, 64, 64, device="cuda"))
model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[rank])
try:
    model(torch.zeros(256, 3, 64, 64, device="cuda")).sum().backward()
    outcome = "ran"
except torch.OutOfMemoryError:
    outcome = "out of memory"
print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {outcome}", flush=True)
os._exit(0)
"""


def test_one_rank_of_eight_passes_the_checks_of_ddp_and_fsdp(rehearsed: Rehearsed) -> None:
    """Collectives act as if all ranks held the same. DDP adds buckets. FSDP keeps an eighth."""
    seen = rehearsed(_ONE_OF_EIGHT, gpu="A100 80GB")
    assert seen["gathered"] == [[3, 4]] * 8
    assert (seen["summed"], seen["least"]) == ([24, 32], [3, 4])
    assert seen["halves"] == [12.0, torch.tensor(-0.1).half().mul(8).item()]
    assert seen["brain"] == [12.0, 800.0]
    assert seen["part"] == [0.0]
    assert seen["of_four"] == [3, 4] * 4
    parameters = 4 * (64 * 3 * 9 + 64 * 3 + 64 * 900 * 200 + 200)
    # Weights and two moments; DDP's buckets on top (twice in torch 2.8); FSDP keeps an eighth.
    assert 3 * parameters <= seen["plain"] <= 3 * parameters + (1 << 20)
    assert 4 * parameters <= seen["replicated"] <= 5 * parameters + (2 << 20)
    assert seen["sharded"] < 3 * parameters / 8 + (1 << 20)


@pytest.mark.rehearses
def test_ranks_of_torchrun_each_rehearse_their_own_card(tmp_path: Path) -> None:
    """Two processes connect through torchrun's store, and only one runs out of memory."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(_RANK))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    added = rehearsed_environment(find_gpu("RTX 3060"), num_gpus=2)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            f"--master-port={port}",
            *(str(script), "full"),
        ],
        env={**os.environ, **added, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == ["rank 0 of 2: ran", "rank 1 of 2: out of memory"]
