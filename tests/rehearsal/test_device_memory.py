"""The budget of a rehearsed card, and torch's own allocator on it under each of its settings."""

from __future__ import annotations

from memfit.cards import find_gpu
from memfit.simulation.allocator.addresses import HANDLE_BYTES, Addresses

from .conftest import Rehearsed

GIB = 2**30
MIB = 2**20


def test_card_is_what_torch_sees_and_fails_as_a_real_one_does(rehearsed: Rehearsed) -> None:
    """Torch sees the card's name, capability and bytes. A shortage is torch's own error."""
    card = find_gpu("RTX 3060")

    seen = rehearsed(
        """
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
            taken=free - after, message=message, num_ooms=torch.cuda.memory_stats()["num_ooms"],
            missing=device.memfit_rehearsal_missing_bytes(0),
            failures=device.memfit_rehearsal_num_failures(0),
            used=device.memfit_rehearsal_used_bytes(0),
        )
        """,
        memory="11GiB",
        others="2GiB",
    )

    free_bytes = 9 * GIB - card.context_bytes
    assert seen["name"] == card.name
    assert tuple(seen["capability"]) == card.compute_capability
    assert seen["processors"] == card.multiprocessors
    assert (seen["total"], seen["free"]) == (11 * GIB, free_bytes)
    assert seen["taken"] == seen["used"] == 4 * GIB
    assert "Tried to allocate 8.00 GiB" in seen["message"]
    assert seen["num_ooms"] == 1
    # torch asks again after it has emptied its cache.
    assert seen["failures"] >= 1
    assert seen["missing"] == 8 * GIB - (free_bytes - 4 * GIB)


_FRAGMENTS = """
    def fragments():
        whole = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
        del whole
        part = torch.empty(1100 * MIB, dtype=torch.uint8, device="cuda")
        try:
            large = torch.empty(2500 * MIB, dtype=torch.uint8, device="cuda")
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        expandable = {segment["is_expandable"] for segment in torch.cuda.memory_snapshot()}
        used = device.memfit_rehearsal_used_bytes(0)
        return fits, list(expandable), torch.cuda.memory_reserved(), used
"""


def test_expandable_segments_do_not_fragment(rehearsed: Rehearsed) -> None:
    """A growing segment holds what a split one cannot. Torch and the driver agree on bytes."""
    seen = rehearsed(
        _FRAGMENTS + "    answer(grown=fragments())",
        memory="4GiB",
        variables={"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
    )

    assert seen["grown"] == [True, [True], 3600 * MIB, 3600 * MIB]


def test_torchs_settings_do_what_they_do(rehearsed: Rehearsed) -> None:
    """They change fragmentation, the splitting of large blocks, and what a cap gives back."""
    seen = rehearsed(
        _FRAGMENTS
        + """
    def split():
        whole = torch.empty(GIB, dtype=torch.uint8, device="cuda")
        del whole
        part = torch.empty(100 * MIB, dtype=torch.uint8, device="cuda")
        return torch.cuda.memory_reserved()

    def garbage():
        for size in (400, 600, 800):
            torch.empty(size * MIB, dtype=torch.uint8, device="cuda")
        kept = torch.empty(1000 * MIB, dtype=torch.uint8, device="cuda")
        return torch.cuda.memory_reserved()

    def measured(function):
        torch.cuda.empty_cache()
        assert device.memfit_rehearsal_used_bytes(0) == torch.cuda.memory_reserved() == 0
        return function()

    plain = [measured(fragments), measured(split)]
    torch.cuda.set_per_process_memory_fraction(0.9)  # torch collects only under a cap
    plain.append(measured(garbage))
    torch.cuda.memory._set_allocator_settings("max_split_size_mb:512")
    limited = measured(split)
    torch.cuda.memory._set_allocator_settings("garbage_collection_threshold:0.3")
    answer(plain=plain, limited=limited, collected=measured(garbage))
        """,
        memory="4GiB",
    )

    assert seen["plain"] == [[False, [False], 2 * GIB, 2 * GIB], GIB, 2800 * MIB]
    assert seen["limited"] == GIB + 100 * MIB
    assert seen["collected"] == 1800 * MIB


def test_without_torchs_cache_the_driver_serves_each_tensor(rehearsed: Rehearsed) -> None:
    """Small tensors share a page of 2 MiB. Large ones take whole pages. All are given back."""
    seen = rehearsed(
        """
        used = lambda: device.memfit_rehearsal_used_bytes(0)
        small = [torch.empty(1000, device="cuda") for _ in range(100)]
        with_small = used()
        large = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
        with_large = used()
        del large
        freed = used()
        addresses = {tensor.data_ptr() for tensor in small}
        del small
        answer(
            small=with_small, large=with_large, freed=freed, end=used(), different=len(addresses)
        )
        """,
        variables={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )

    assert seen == {
        "small": 2 * MIB,
        "large": 6 * MIB,
        "freed": 2 * MIB,
        "end": 0,
        "different": 100,
    }


def test_the_asynchronous_backend_holds_and_fails_as_a_pool(rehearsed: Rehearsed) -> None:
    """With `backend:cudaMallocAsync`, the pool counts bytes, keeps them, trims, and runs out."""
    seen = rehearsed(
        """
        one = torch.empty(GIB, dtype=torch.uint8, device="cuda")
        with_one = torch.cuda.memory_stats()
        del one
        torch.cuda.synchronize()
        kept = device.memfit_rehearsal_used_bytes(0)
        torch.cuda.empty_cache()
        trimmed = device.memfit_rehearsal_used_bytes(0)
        try:
            torch.empty(20 * GIB, dtype=torch.uint8, device="cuda")
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        answer(
            backend=torch.cuda.get_allocator_backend(), kept=kept, trimmed=trimmed, fits=fits,
            allocated=with_one["allocated_bytes.all.current"],
            reserved=with_one["reserved_bytes.all.current"],
        )
        """,
        variables={"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
    )

    assert seen == {
        "backend": "cudaMallocAsync",
        "allocated": GIB,
        "reserved": GIB,
        "kept": GIB,
        "trimmed": 0,
        "fits": False,
    }


def test_memory_lies_where_the_simulation_puts_it(rehearsed: Rehearsed) -> None:
    """The device and the simulation place memory by one rule, before and after the first kernel."""
    sizes = [20, 2, 30, 20, 40, 2, 14, 196, 2, 12, 20, 20, 50, 26, 6, 100, 8, 20, 2, 34] * 6
    seen = rehearsed(
        f"""
        sizes = {sizes}
        taken, places = [], []
        def take(num_mib):
            pointer = ctypes.c_void_p()
            assert device.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(num_mib * MIB)) == 0
            taken.append(pointer.value)
            places.append(pointer.value)
        kernels = torch.empty(1, device="cuda")
        first = kernels.data_ptr()
        for number, num_mib in enumerate(sizes):
            if number == 40:
                kernels.add_(1)
            if number == 60:
                handle = ctypes.c_void_p()
                assert device.cublasCreate_v2(ctypes.byref(handle)) == 0
            if number % 3 == 2:
                gone = taken.pop(number * 7 % len(taken))
                assert device.cudaFree(ctypes.c_void_p(gone)) == 0
            take(num_mib)
        answer(places=[place - first for place in places])
        """,
        memory="20GiB",
    )

    addresses = Addresses()
    first = addresses.place(2 * MIB)
    taken: list[tuple[int, int]] = []
    places = []
    for number, num_mib in enumerate(sizes):
        if number == 40:
            addresses.run_kernels()
        if number == 60:
            addresses.place(HANDLE_BYTES)
        if number % 3 == 2:
            addresses.vacate(*taken.pop(number * 7 % len(taken)))
        taken.append((addresses.place(num_mib * MIB), num_mib * MIB))
        places.append(taken[-1][0] - first)
    assert seen["places"] == places
