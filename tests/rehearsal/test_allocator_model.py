"""The simulated caching allocator, held against the installed torch on a rehearsed card."""

from __future__ import annotations

import pytest
import torch

from memfit.simulation.allocator.blocks import BlockOrder
from memfit.simulation.allocator.caching import AllocatorOutOfMemoryError, CachingAllocator
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.simulation.tracing.releases import torch_release
from rehearsal.conftest import Rehearsed

# Sizes that come again and again, so that many free blocks have the same size.
_REQUESTS = """
import random
KIB = 1024
SIZES = [512, 2 * KIB, 300 * KIB, MIB, 3 * MIB // 2, 2 * MIB, 3 * MIB, 12 * MIB, 24 * MIB, 30 * MIB]
draw = random.Random(1)
held, done = {}, []
for number in range(2000):
    choice = draw.random()
    if choice < 0.004:
        torch.cuda.empty_cache()
        done.append(["empty_cache", 0, 0])
    elif held and choice < 0.44:
        freed = draw.choice(list(held))
        del held[freed]
        done.append(["free", freed, 0])
    else:
        size = draw.choice(SIZES)
        try:
            held[number] = torch.empty(size, dtype=torch.uint8, device="cuda")
        except torch.cuda.OutOfMemoryError:
            done.append(["refused", number, size])
        else:
            done.append(["allocate", number, size])
    done[-1].append(torch.cuda.memory_reserved())
answer(done=done, free=torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
"""


@pytest.mark.parametrize("memory", ["1GiB", "24GiB"])
@pytest.mark.parametrize("options", ["", "expandable_segments:True", "max_split_size_mb:25"])
def test_it_reserves_what_torch_reserves(rehearsed: Rehearsed, options: str, memory: str) -> None:
    """After each of 2000 requests and frees, and which requests find no room."""
    # torch warns when expandable segments find no room.
    variables = {"PYTORCH_CUDA_ALLOC_CONF": options, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    found = rehearsed(_REQUESTS, memory=memory, variables=variables)
    settings = AllocatorSettings.from_environment(variables, torch_release=torch_release())
    allocator = CachingAllocator(capacity_bytes=found["free"], settings=settings)
    for at, (action, number, num_bytes, reserved) in enumerate(found["done"]):
        if action == "empty_cache":
            allocator.empty_cache()
        elif action == "free":
            allocator.free(number)
        elif action == "allocate":
            allocator.allocate(number, num_bytes)
        else:
            with pytest.raises(AllocatorOutOfMemoryError):
                allocator.allocate(number, num_bytes)
        assert allocator.stats.reserved_bytes == reserved, f"request {at}: {action} {num_bytes}"
    num_refused = sum(action == "refused" for action, *_ in found["done"])
    assert (num_refused > 0) == (memory == "1GiB")


def test_every_release_has_its_order() -> None:
    """Both changes came in a release that is supported, and the newest order stays."""
    orders = [BlockOrder.of(release) for release in ((2, 8), (2, 11), (2, 12), (2, 13), (3, 0))]
    assert orders == [
        BlockOrder.ADDRESS,
        BlockOrder.ADDRESS,
        BlockOrder.BLOCK,
        BlockOrder.SEGMENT,
        BlockOrder.SEGMENT,
    ]
    assert torch.__version__ >= "2.8"
