"""The budget of a rehearsed card, and torch's own allocator on it."""

from __future__ import annotations

from memfit.cards import find_gpu

from .conftest import Rehearsed

GIB = 2**30
MIB = 2**20


def test_card_is_what_torch_sees_and_fails_as_a_real_one_does(rehearsed: Rehearsed) -> None:
    """Name, capability and bytes are the card's; what does not fit is torch's own error."""
    card = find_gpu("RTX 3060")

    seen = rehearsed("""
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        kept = torch.empty(1024, 1024, 1024, device="cuda")
        after, _ = torch.cuda.mem_get_info()
        try:
            torch.empty(8 << 30, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as exc:
            message = str(exc)
        answer(
            name=properties.name, capability=torch.cuda.get_device_capability(),
            processors=properties.multi_processor_count, total=total, free=free,
            taken=free - after, message=message, retries=torch.cuda.memory_stats()["num_ooms"],
        )
    """)

    assert seen["name"] == card.name
    assert tuple(seen["capability"]) == card.compute_capability
    assert seen["processors"] == card.multiprocessors
    assert seen["total"] == card.total_bytes
    assert seen["free"] == card.usable_bytes
    assert seen["taken"] == 4 * GIB
    assert "Tried to allocate 8.00 GiB" in seen["message"]
    assert seen["retries"] == 1
