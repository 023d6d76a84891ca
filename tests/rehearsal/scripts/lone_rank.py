"""Collectives of objects and of flags, in a world of which this process is one rank.

Its first process group has a store of its own. It also trains a recurrent layer, for which cuDNN
takes memory that it does not tell.
"""

from __future__ import annotations

import os

import torch
from torch import distributed


def main() -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        host_name="localhost", port=29511, world_size=world_size, is_master=rank == 0
    )
    distributed.init_process_group("nccl", store=store, rank=rank, world_size=world_size)
    distributed.destroy_process_group()
    distributed.init_process_group("nccl")
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    every: list[object] = [None] * world_size
    distributed.all_gather_object(every, {"rank": rank})
    gathered: list[object] = [None] * world_size
    distributed.gather_object(rank, gathered if rank == 0 else None)
    shared = ["settings", rank]
    distributed.broadcast_object_list(shared, src=0)
    own: list[object] = [None]
    distributed.scatter_object_list(own, [10 * number for number in range(world_size)])
    flag = torch.tensor([1], device="cuda")
    distributed.all_reduce(flag)
    distributed.barrier()
    layer = torch.nn.LSTM(8, 8, 2, dropout=0.1).cuda()
    layer(torch.zeros(4, 2, 8, device="cuda"))[0].sum().backward()
    print(every == [{"rank": rank}] * world_size, gathered, shared, own, flag.item(), flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
