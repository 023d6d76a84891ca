"""Streams, events and CUDA graphs of a rehearsed card."""

from __future__ import annotations

from .conftest import Rehearsed


def test_graphs_are_captured_replayed_and_have_their_own_pool(rehearsed: Rehearsed) -> None:
    """A captured step has a private pool, side streams included. A replay allocates nothing."""
    seen = rehearsed("""
        import warnings
        # torch's own words on the streams of a graphed backward.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
        x = torch.ones(512, 1024, device="cuda")
        side = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first = x * 2
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                joined = torch.cuda.is_current_stream_capturing()
                second = first.relu()
            torch.cuda.current_stream().wait_stream(side)
        pools = {tuple(segment["segment_pool_id"]) for segment in torch.cuda.memory_snapshot()}
        allocated = torch.cuda.memory_allocated()
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        after = torch.cuda.memory_allocated()
        shared = torch.cuda.CUDAGraph()
        with torch.cuda.graph(shared, pool=graph.pool()):
            third = x + 1
        model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.ReLU()).cuda()
        sample = torch.randn(8, 64, device="cuda", requires_grad=True)
        graphed = torch.cuda.make_graphed_callables(model, (sample,))
        graphed(torch.randn(8, 64, device="cuda", requires_grad=True)).sum().backward()
        has_gradient = model[0].weight.grad is not None
        bad = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(bad):
                x.sum().item()
            error = ""
        except RuntimeError as exc:
            error = str(exc)
        usable = (torch.ones(3).cuda() + 1).cpu().shape[0]
        answer(
            joined=joined, pools=sorted(pools), same=allocated == after, error=error,
            has_gradient=has_gradient, usable=usable,
            capturing=torch.cuda.is_current_stream_capturing(),
        )
    """)

    assert seen["joined"]
    assert [0, 0] in seen["pools"]
    assert len(seen["pools"]) == 2
    assert seen["same"]
    assert seen["has_gradient"]
    # A value cannot be read in a capture: torch's own sentence, and the capture is over.
    assert "error during capture" in seen["error"]
    assert seen["usable"] == 3
    assert not seen["capturing"]


def test_events_have_times_and_streams_their_devices(rehearsed: Rehearsed) -> None:
    """Two devices count their bytes, exchange tensors, and time their streams separately."""
    seen = rehearsed(
        """
        here = torch.arange(5).to("cuda:0")
        there = here.to("cuda:1")
        large = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:1")
        used = [device.memfit_rehearsal_used_bytes(i) for i in (0, 1)]
        with torch.cuda.device(1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.Stream(priority=-1)
            start.record()
            with torch.cuda.stream(stream):
                large.add_(1)
            stream.synchronize()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
        answer(
            values=there.tolist(), back=there.to("cuda:0").tolist(), used=used,
            elapsed=elapsed, stream=str(stream.device), is_ready=stream.query() and end.query(),
            peers=torch.cuda.can_device_access_peer(0, 1),
            uuids=len({str(torch.cuda.get_device_properties(i).uuid) for i in (0, 1)}),
        )
        """,
        num_gpus=2,
    )

    assert seen["values"] == seen["back"] == [0, 1, 2, 3, 4]
    assert seen["used"] == [2**21, 2**30 + 2**21]
    assert seen["elapsed"] >= 0
    assert seen["stream"] == "cuda:1"
    assert seen["is_ready"]
    assert seen["peers"]
    assert seen["uuids"] == 2
