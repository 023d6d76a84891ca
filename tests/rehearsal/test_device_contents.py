"""What a rehearsed card's memory contains, what is counted of it, and what it takes of the host."""

from __future__ import annotations

from .conftest import Rehearsed

MIB = 2**20


def test_contents_and_the_count_of_reads(rehearsed: Rehearsed) -> None:
    """A read returns what the host wrote, or zeros, and it is counted as one or the other."""
    seen = rehearsed("""
        import threading, traceback
        reads = []

        @ctypes.CFUNCTYPE(None, ctypes.c_size_t, ctypes.c_int)
        def on_read(num_bytes, is_known):
            is_main = threading.current_thread() is threading.main_thread()
            reads.append((num_bytes, is_known, is_main, traceback.extract_stack()[-2].line))

        known = torch.tensor([1.0, 2.0]).cuda()
        unknown = torch.empty(3, device="cuda")
        device.memfit_rehearsal_on_read(on_read)
        known.cpu()
        unknown.sum().item()
        device.memfit_rehearsal_on_read(ctypes.cast(None, type(on_read)))
        unknown.cpu()
        num_reads = sum(device.memfit_rehearsal_num_reads(i) for i in (0, 1))
        num_unknown = device.memfit_rehearsal_num_unknown_reads()
        num_unknown_bytes = device.memfit_rehearsal_unknown_read_bytes()

        source = torch.arange(3_000_000, dtype=torch.float32) + 1
        there = source.cuda()
        moved = torch.empty_like(there)
        moved.copy_(there)
        back = torch.equal(moved.cpu(), source)
        slice_back = torch.equal(there[999:2_000_001].cpu(), source[999:2_000_001])
        computed = (there + 1).cpu()
        place = there.data_ptr()
        del there
        # The allocator chooses the smallest block that is large enough. That may be another.
        candidates = [torch.empty(3_000_000, device="cuda") for _ in range(4)]
        reused = min(candidates, key=lambda one: one.data_ptr() != place)
        words = torch.full((4,), 7, dtype=torch.int64).pin_memory().to("cuda", non_blocking=True)
        answer(
            reads=reads, num_reads=num_reads, unknown=[num_unknown, num_unknown_bytes],
            back=back, slice_back=slice_back, computed=computed.abs().sum().item(),
            same_place=place == reused.data_ptr(), reused=reused.cpu().abs().sum().item(),
            words=words.tolist(), kept=device.memfit_rehearsal_kept_bytes(),
        )
    """)

    assert seen["reads"] == [
        [8, 1, True, "known.cpu()"],
        [4, 0, True, "unknown.sum().item()"],
    ]
    assert seen["num_reads"] == 3
    assert seen["unknown"] == [2, 4 + 12]
    assert seen["back"]
    assert seen["slice_back"]
    assert seen["computed"] == 0
    # A tensor that takes another's place does not read as that one did.
    assert seen["same_place"]
    assert seen["reused"] == 0
    assert seen["words"] == [7, 7, 7, 7]
    # Two copies of 12 MB were kept, and one of them was given back.
    assert 12 * MIB <= seen["kept"] <= 20 * MIB


def test_a_model_larger_than_what_is_kept_takes_little_of_the_host(rehearsed: Rehearsed) -> None:
    """Of 20 GiB copied to an H100, 512 MiB are kept. Small copies are kept longest."""
    seen = rehearsed(
        """
        import resource
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        block = torch.ones(GIB, dtype=torch.uint8)
        torch.ones(1).cuda()
        before = peak()
        there = [block.cuda() for _ in range(20)]
        lengths = torch.tensor([3, 1, 2]).cuda()
        answer(
            grown=peak() - before, lengths=lengths.tolist(),
            first=there[0][:4].tolist(), last=there[-1][:4].tolist(),
            kept=device.memfit_rehearsal_kept_bytes(),
        )
        """,
        gpu="H100",
    )

    assert seen["grown"] < 700 * MIB
    assert 500 * MIB < seen["kept"] <= 514 * MIB
    assert seen["lengths"] == [3, 1, 2]
    assert (seen["first"], seen["last"]) == ([1, 1, 1, 1], [0, 0, 0, 0])
