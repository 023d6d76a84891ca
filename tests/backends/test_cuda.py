"""Trials on a GPU: the logic is tested on a made-up card, and the rest on a real one."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from memfit import Workload, probe
from memfit.backends import cuda, open_backend
from memfit.backends.cuda import CudaBackend
from memfit.errors import DoesNotFitError, UnknownDeviceError, UsageError
from memfit.records import DeviceProcess, Outcome, Precision, StepOptions, Trial
from memfit.step.training_step import TrainingStep
from memfit.units import GIB, MIB

FP32 = StepOptions(precision=Precision.FP32)
GPU = torch.device("cuda", 0)


@dataclasses.dataclass
class Card:
    """A made-up card: steps run on the CPU and ask the card for room."""

    total_bytes: int = 1000 * MIB
    free_bytes: int = 900 * MIB
    fraction: float = 1.0
    peak_bytes: int = 0
    num_releases: int = 0
    message: str = "CUDA out of memory. Tried to allocate 1.00 GiB."
    fails_anyway_above: int | None = None
    samples: list[int] = dataclasses.field(default_factory=list)

    def step(self, num_samples: int) -> None:
        """Take one MiB for each sample, or fail like the libraries of a card."""
        self.samples.append(num_samples)
        wanted = num_samples * MIB
        room = min(self.free_bytes, int(self.total_bytes * self.fraction))
        self.peak_bytes = max(self.peak_bytes, min(wanted, room))
        if self.fails_anyway_above is not None and num_samples > self.fails_anyway_above:
            raise RuntimeError(self.message)
        if wanted > room:
            raise RuntimeError(self.message)


class Event:
    """An event, half a second from any other."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        """Do nothing."""

    def elapsed_time(self, _end: Event) -> float:
        """Return milliseconds."""
        return 500.0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """Put a made-up card in the place of torch.cuda; its steps run on the CPU."""
    made = Card()

    def release(_device: torch.device) -> int:
        gc.collect()
        made.num_releases += 1
        return 0

    def stats(_device: torch.device) -> dict[str, int]:
        return {f"{kind}_bytes.all.peak": made.peak_bytes for kind in ("reserved", "allocated")}

    def set_fraction(fraction: float, _device: torch.device) -> None:
        made.fraction = fraction

    def reset(_device: torch.device) -> None:
        made.peak_bytes = 0

    properties = type("Properties", (), {"total_memory": made.total_bytes, "uuid": "1-2"})()
    fakes: dict[str, Any] = {
        # Optimizers would ask an available card for its stream.
        "is_available": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda _device: "Made-up card",
        "get_device_properties": lambda _device: properties,
        "is_bf16_supported": lambda including_emulation: False,
        "mem_get_info": lambda _device: (made.free_bytes, made.total_bytes),
        "memory_reserved": lambda _device: 0,
        "memory_stats": stats,
        "reset_peak_memory_stats": reset,
        "get_per_process_memory_fraction": lambda _device: made.fraction,
        "set_per_process_memory_fraction": set_fraction,
        "synchronize": lambda _device: None,
        "Event": Event,
        "device": lambda _device: _Nothing(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(cuda, "release", release)
    monkeypatch.setattr(cuda, "_other_processes", lambda _device: ())
    prepare = TrainingStep.prepare
    monkeypatch.setattr(
        TrainingStep, "prepare", lambda self, _device: prepare(self, torch.device("cpu"))
    )
    return made


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc_info: object) -> None:
        pass


# Each search takes seconds of a CPU, rehearsed or not: a rehearsal runs these of the twelve.
REHEARSED = (
    ("resnet18", "fp32"),
    ("vit_tiny_patch16_224", "amp-bf16"),
    ("resnet18", "bf16"),
)
LONG = pytest.mark.long


class Asking(nn.Module):
    """Asks the card for room at every forward."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        # A weak one, so that the card is not put back with what the model keeps.
        self.card = weakref.ref(card)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, 2)."""
        card = self.card()
        assert card is not None
        card.step(x.shape[0])
        scores: torch.Tensor = self.linear(x)
        return scores


def asking(card: Card, **changes: Any) -> Workload:
    model = Asking(card)
    parts = {
        "model": model,
        "batch": torch.ones(2, 2),
        "loss": lambda out: out.sum(),
        "optimizer": torch.optim.Adam(model.parameters()),
    }
    return Workload(**{**parts, **changes})


def test_a_search_on_a_card_is_exact_and_leaves_the_users_objects(card: Card) -> None:
    """The edge is proved, and weights, state and cap are as before."""
    workload = asking(card)
    before = [tensor.clone() for tensor in workload.model.state_dict().values()]
    step = TrainingStep(subject=workload, options=FP32)
    with CudaBackend(GPU) as backend:
        fits, over = backend.trial(step, 900), backend.trial(step, 901)
        assert backend.device_name == "Made-up card"
        assert backend.auto_precision is Precision.AMP_FP16
        assert backend.environment == ()
    assert fits.fits
    assert over.outcome is Outcome.OUT_OF_MEMORY
    assert over.message == "CUDA out of memory. Tried to allocate 1.00 GiB."
    assert fits.step_seconds == 0.5
    assert fits.peak_reserved_bytes == 900 * MIB
    after = workload.model.state_dict().values()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert isinstance(workload.optimizer, torch.optim.Optimizer)
    assert workload.optimizer.state == {}
    assert card.fraction == 1.0
    assert card.num_releases >= 4


def test_a_cap_emulates_a_smaller_card(card: Card) -> None:
    """The allocator gets the cap, and afterwards its old limit again."""
    card.fraction = 0.8
    step = TrainingStep(subject=asking(card), options=FP32)
    with CudaBackend(GPU, memory_bytes=300 * MIB) as backend:
        assert backend.trial(step, 300).fits
        assert not backend.trial(step, 301).fits
        assert backend.needed_bytes(step, 301) == 301 * MIB
        assert backend.capacity().usable_bytes == 300 * MIB
    assert card.fraction == 0.8


def test_without_a_cap_there_is_no_more_room_to_measure(card: Card) -> None:
    """If a step does not fit the whole card, the card cannot measure it."""
    with CudaBackend(GPU) as backend:
        assert backend.needed_bytes(TrainingStep(subject=asking(card), options=FP32), 901) is None


def test_a_suspect_under_a_cap_is_tried_without_it(card: Card) -> None:
    """It runs with the rest of the card, so the cause was memory."""
    card.message = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    with CudaBackend(GPU, memory_bytes=300 * MIB) as backend:
        trial = backend.trial(TrainingStep(subject=asking(card), options=FP32), 301)
    assert trial.outcome is Outcome.OUT_OF_MEMORY


def test_a_suspect_on_a_full_card_is_memory_if_half_of_it_runs(card: Card) -> None:
    """No more room can be given, so half of the batch is tried."""
    card.message = "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"
    with CudaBackend(GPU) as backend:
        trial = backend.trial(TrainingStep(subject=asking(card), options=FP32), 901)
    assert trial.outcome is Outcome.OUT_OF_MEMORY
    assert card.samples[-1] == 450


@pytest.mark.parametrize("memory_bytes", [None, 300 * MIB])
def test_a_librarys_real_limit_is_raised_as_it_came(card: Card, memory_bytes: int | None) -> None:
    """If more room does not help, or room was left, the error is the user's."""
    card.message = "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"
    card.fails_anyway_above = 5
    with (
        CudaBackend(GPU, memory_bytes=memory_bytes) as backend,
        pytest.raises(RuntimeError, match="NOT_SUPPORTED"),
    ):
        backend.trial(TrainingStep(subject=asking(card), options=FP32), 6)


def test_a_poisoned_context_ends_the_search(card: Card) -> None:
    """Nothing repairs an illegal access, so it is raised at once."""
    card.message = "CUDA error: an illegal memory access was encountered"
    card.fails_anyway_above = 0
    with CudaBackend(GPU) as backend, pytest.raises(RuntimeError, match="illegal"):
        backend.trial(TrainingStep(subject=asking(card), options=FP32), 2)
    assert card.samples == [2]


def test_impossible_cards_and_caps_get_a_sentence(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says which GPUs the machine has, or which process holds the memory."""
    with pytest.raises(UnknownDeviceError, match="the last GPU here is cuda:0"):
        CudaBackend(torch.device("cuda", 3))
    other = DeviceProcess(pid=7, name="python3", used_bytes=GIB)
    monkeypatch.setattr(cuda, "_other_processes", lambda _device: (other,))
    with pytest.raises(UsageError, match=r"at most 900 MiB; python3 \(pid 7\) is on it too"):
        CudaBackend(torch.device("cuda"), memory_bytes=950 * MIB)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_machine_without_a_gpu_says_so() -> None:
    """The message says what to give instead."""
    with pytest.raises(UnknownDeviceError, match="give --device cpu"):
        CudaBackend(torch.device("cuda"))


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:x"])
def test_devices_that_cannot_measure_are_refused(device: str) -> None:
    """torch does not know some of them, and others have no memory that can run out."""
    with pytest.raises(UnknownDeviceError, match=device):
        open_backend(device)


class Nvml:
    """A made-up driver's library: one GPU, one MIG slice, three processes."""

    class NVMLError(Exception):
        """Stands in for the library's error."""

    def __init__(self, known: str, *, starts: bool = True) -> None:
        self.known = known
        self.starts = starts

    def nvmlInit(self) -> None:  # noqa: N802 - the library's name
        """Start, or fail."""
        if not self.starts:
            raise self.NVMLError

    def nvmlShutdown(self) -> None:  # noqa: N802
        """Stop."""

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        """Return the handle of the one known identifier."""
        if uuid != self.known:
            raise self.NVMLError
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, _handle: str) -> list[Any]:  # noqa: N802
        """Return this process, the first one, and one that is gone."""
        import os

        pids = {os.getpid(): 1, 1: 2 * GIB, 2**22 + 1: None}
        return [type("P", (), {"pid": p, "usedGpuMemory": used})() for p, used in pids.items()]


@pytest.mark.parametrize("known", ["GPU-1-2", "MIG-1-2"])
def test_other_processes_are_named(monkeypatch: pytest.MonkeyPatch, known: str) -> None:
    """Processes on the same GPU or slice are named, except this one."""
    import sys

    properties = type("Properties", (), {"uuid": "1-2"})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(known))
    first, gone = cuda._other_processes(GPU)
    assert (first.pid, first.used_bytes) == (1, 2 * GIB)
    assert first.name
    assert gone.name == "a process of another container or user"
    assert gone.used_bytes is None
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("other"))
    assert cuda._other_processes(GPU) == ()
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(known, starts=False))
    assert cuda._other_processes(GPU) == ()


# --- on a real GPU ------------------------------------------------------------------------------


@pytest.fixture
def clean_gpu() -> Iterator[Callable[[], int]]:
    """Return what counts the bytes still reserved."""
    torch.cuda.empty_cache()
    yield torch.cuda.memory_reserved
    torch.cuda.empty_cache()


def trials_of(result: Any, batch_size: int) -> list[Trial]:
    return [trial for trial in result.trials if trial.batch_size == batch_size]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(name, precision, marks=() if (name, precision) in REHEARSED else LONG)
        for name in ("resnet18", "vit_tiny_patch16_224", "convnext_atto")
        for precision in ("fp32", "amp-bf16", "amp-fp16", "bf16")
    ],
)
def test_real_cards_give_an_answer_with_its_certificate(
    name: str, precision: str, clean_gpu: Callable[[], int]
) -> None:
    """Under a cap of 4 GiB it is proved, twice alike, and nothing is held afterwards.

    Torch keeps the cuDNN plans that it settled for when memory was short. With them, batch sizes
    near the edge need fewer retries in a second search, which moves the edge by a sample or so.
    """
    before = clean_gpu()
    first = probe(name, device="cuda", memory="4GiB", precision=precision)
    second = probe(name, device="cuda", memory="4GiB", precision=precision)
    assert first.proved
    assert trials_of(first, first.max_batch_size)[-1].fits
    assert not trials_of(first, first.max_batch_size + 1)[-1].fits
    assert second.proved
    near = max(2, first.max_batch_size // 100)
    assert abs(second.max_batch_size - first.max_batch_size) <= near
    assert second.recommended_batch_size == first.recommended_batch_size
    assert len(first.trials) <= 12
    assert clean_gpu() <= before
    stand = first.recommended_batch_size
    assert stand is not None
    trial = trials_of(first, stand)[-1]
    assert trial.num_alloc_retries == 0
    assert trial.peak_reserved_bytes is not None
    assert trial.peak_reserved_bytes <= 0.95 * 4 * GIB


@pytest.mark.gpu
def test_a_real_search_leaves_a_live_model_as_it_was(clean_gpu: Callable[[], int]) -> None:
    """Weights, statistics, state and random numbers on the device are equal bit for bit."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.LazyLinear(10))
    model.to("cuda")(torch.randn(2, 3, 64, 64, device="cuda"))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = (torch.randn(2, 3, 64, 64), torch.randint(10, (2,)))
    workload = Workload(model, batch, nn.CrossEntropyLoss(), optimizer)
    before = [tensor.cpu() for tensor in model.state_dict().values()]
    state = torch.cuda.get_rng_state()
    for options in ({"precision": "fp32"}, {"precision": "bf16", "channels_last": True}):
        result = probe(workload, memory="2GiB", **options)
        assert result.proved
        after = [tensor.cpu() for tensor in model.state_dict().values()]
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
        assert torch.equal(state, torch.cuda.get_rng_state())
        assert optimizer.state == {}


@pytest.mark.gpu
def test_a_real_card_that_is_too_small_says_what_is_needed() -> None:
    """A run without the cap gives the bytes needed."""
    with pytest.raises(DoesNotFitError, match=r"it needs .* and 64.0 MiB are available"):
        probe("resnet50", device="cuda", memory="64MiB")
