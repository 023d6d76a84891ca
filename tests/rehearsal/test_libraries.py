"""Other libraries on a rehearsed card: solvers, transforms, the profiler, NVML, Triton."""

from __future__ import annotations

import shutil

import pytest

from .conftest import Rehearsed

_MATHEMATICS = """
from torch import linalg
def square(*sizes):
    return torch.randn(*sizes, device="cuda")
batch = square(3, 8, 8)
shapes = {
    "fft": torch.fft.irfft2(torch.fft.rfft2(square(4, 32, 32))),
    "inverse": linalg.inv(batch), "cholesky": linalg.cholesky(batch), "svd": linalg.svd(batch)[1],
    "qr": linalg.qr(batch)[0], "eigh": linalg.eigh(square(600, 600))[0],
    "solve": linalg.solve(batch, square(3, 8, 2)), "determinant": linalg.det(batch),
    "least_squares": linalg.lstsq(batch, square(3, 8, 2)).solution,
    "compiled_at_run_time": torch.special.bessel_j0(square(5)),
    "attention": torch.nn.functional.scaled_dot_product_attention(
        *(square(2, 4, 64, 32).half() for _ in range(3))
    ),
    "integers": torch._int_mm(*[torch.ones(32, 32, dtype=torch.int8, device="cuda")] * 2),
}
crow, column = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2])
with torch.sparse.check_sparse_tensor_invariants(False):
    import warnings
    warnings.simplefilter("ignore")
    rows = torch.sparse_csr_tensor(crow, column, torch.ones(3), (3, 3)).cuda()
    shapes["sparse"] = rows @ square(3, 4)
    shapes["sparse_sum"] = rows + rows
    shapes["sparse_coordinates"] = torch.sparse.mm(rows.to_sparse_coo(), square(3, 4))
answer(shapes={name: list(tensor.shape) for name, tensor in shapes.items()})
"""

_NVML = """
import pynvml
pynvml.nvmlInit()
kept = torch.empty(300 * MIB, dtype=torch.uint8, device="cuda:1")
handle = pynvml.nvmlDeviceGetHandleByIndex(1)
memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
uuid = torch.cuda.get_device_properties(1).uuid
by_uuid = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
answer(
    count=torch.cuda.device_count(), counted=pynvml.nvmlDeviceGetCount(),
    name=pynvml.nvmlDeviceGetName(handle), total=memory.total,
    free=memory.free, free_of_cuda=torch.cuda.mem_get_info(1)[0],
    processes=[(p.pid, p.usedGpuMemory) for p in processes], own=os.getpid(),
    capability=pynvml.nvmlDeviceGetCudaComputeCapability(handle),
    index=pynvml.nvmlDeviceGetIndex(by_uuid), use=torch.cuda.utilization(1),
    idle=len(pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))),
)
"""

_PROFILER = """
from torch.profiler import ProfilerActivity, profile
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the profiler itself is not silent
with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], profile_memory=True) as seen:
    torch.nn.Linear(8, 8).cuda()(torch.zeros(4, 8, device="cuda")).sum().backward()
names = {event.name for event in seen.events()}
answer(has_linear="aten::linear" in names, on_device=sum(e.device_time for e in seen.events()))
"""

_COMPILED = """
import warnings
warnings.simplefilter("ignore")
@torch.compile
def step(x):
    return (x.sin() + 1).relu().sum(-1)
x = torch.zeros(64, 128, device="cuda", requires_grad=True)
out = step(x)
out.sum().backward()
import glob
kernels = glob.glob(os.environ["TORCHINDUCTOR_CACHE_DIR"] + "/**/*.cubin", recursive=True)
answer(shape=list(out.shape), gradient=list(x.grad.shape), num_kernels=len(kernels))
"""


def test_mathematics_gives_shapes_and_does_not_fail(rehearsed: Rehearsed) -> None:
    """Nothing is computed, so values are zeros. Shapes and calls are as on a GPU."""
    shapes = rehearsed(_MATHEMATICS)["shapes"]
    assert shapes == {
        "fft": [4, 32, 32],
        "inverse": [3, 8, 8],
        "cholesky": [3, 8, 8],
        "svd": [3, 8],
        "qr": [3, 8, 8],
        "eigh": [600],
        "solve": [3, 8, 2],
        "determinant": [3],
        "least_squares": [3, 8, 2],
        "compiled_at_run_time": [5],
        "attention": [2, 4, 64, 32],
        "integers": [32, 32],
        "sparse": [3, 4],
        "sparse_sum": [3, 3],
        "sparse_coordinates": [3, 4],
    }


def test_nvml_shows_the_card_its_memory_and_this_process(rehearsed: Rehearsed) -> None:
    """There are two cards, one of them in use. pynvml and torch say the same of both."""
    seen = rehearsed(_NVML, gpu="RTX 4090", num_gpus=2)
    assert (seen["count"], seen["counted"]) == (2, 2)
    assert (seen["name"], seen["capability"]) == ("NVIDIA GeForce RTX 4090", [8, 9])
    assert seen["free"] == seen["free_of_cuda"]
    [(pid, used)] = seen["processes"]
    assert pid == seen["own"]
    assert used >= 300 << 20
    assert seen["total"] - seen["free"] == used
    assert (seen["index"], seen["use"], seen["idle"]) == (1, 0, 0)


def test_the_profiler_records_a_step_without_a_device_in_it(rehearsed: Rehearsed) -> None:
    """Kernels take no time, so only the CPU's part of the profile has entries."""
    seen = rehearsed(_PROFILER)
    assert seen == {"has_linear": True, "on_device": 0}


@pytest.mark.skipif(shutil.which("cc") is None, reason="Triton compiles its launcher with cc")
def test_triton_compiles_for_the_card(
    rehearsed: Rehearsed, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """torch.compile makes kernels for the card's compute capability. They do not run."""
    folder = tmp_path_factory.mktemp("inductor")
    seen = rehearsed(
        _COMPILED,
        variables={
            "TORCHINDUCTOR_CACHE_DIR": str(folder),
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        },
    )
    assert (seen["shape"], seen["gradient"]) == ([64], [64, 128])
    assert seen["num_kernels"] >= 2


def test_an_accumulator_that_counts_on_the_device_takes_its_steps(rehearsed: Rehearsed) -> None:
    """Counts of valid labels are 0 on a rehearsed device; each part then has the same share."""
    found = rehearsed(
        """
        import memfit
        from torch.nn import functional
        model = torch.nn.Linear(8, 5).cuda()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        accumulator = memfit.Accumulator(
            model,
            optimizer,
            2,
            loss=functional.cross_entropy,
            weight=lambda batch: (batch[1] != -100).sum(),
        )
        steps = []
        optimizer.register_step_post_hook(lambda *_: steps.append(1))
        accumulator.step((torch.randn(6, 8).cuda(), torch.randint(5, (6,)).cuda()))
        answer(steps=len(steps))
        """
    )
    assert found == {"steps": 1}
