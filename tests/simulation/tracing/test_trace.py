"""Traced steps are compared with a real step on the CPU and with arithmetic; some are refused."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from timm.layers import set_fused_attn
from torch import nn
from torch.profiler import ProfilerActivity, profile
from traced_steps import options, requested_peak, step_of

from memfit.backends.traces import trace
from memfit.errors import UnsupportedError
from memfit.records import Action, Event, Precision, StepOptions
from memfit.simulation.tracing.trace import StepTrace
from memfit.simulation.tracing.workspace import Kernels
from memfit.step.training_step import TrainingStep
from memfit.step.workload import Workload


def mlp(optimizer: str = "adamw") -> Workload:
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    batch = (torch.zeros(4, 64), torch.zeros(4, dtype=torch.long))
    return Workload(model, batch, nn.CrossEntropyLoss(), optimizer)


class AttentionBlock(nn.Module):
    """Has residual branches, so that the engine sums gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.first = nn.Linear(32, 128)
        self.second = nn.Linear(128, 32)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            data = data + self.second(nn.functional.gelu(self.first(self.norm(data))))
        return data.mean(1)


def residual() -> Workload:
    batch = (torch.zeros(4, 7, 32), torch.zeros(4, dtype=torch.long))
    return Workload(AttentionBlock(), batch, nn.CrossEntropyLoss(), "sgd")


@pytest.mark.parametrize(
    ("subject", "cpu_only"),
    [("test_vit", {51200, 614400}), (mlp("sgd"), set()), (residual(), set())],
)
@pytest.mark.usefixtures("attention_written_out")
def test_allocates_what_a_real_step_does(subject: str | Workload, cpu_only: set[int]) -> None:
    """A trace has the allocations, size by size, that PyTorch's profiler records on the CPU.

    On the CPU, unlike CUDA, the convolution of the patches unfolds the images and copies its
    output. Small helpers differ below 512 B, where the CUDA allocator has only one size. The
    scratch memory of CUDA's kernels has names of its own, and is left out.
    """
    name = isinstance(subject, str)
    step = TrainingStep(
        subject=subject,
        options=StepOptions(precision=Precision.FP32, optimizer="sgd" if name else None),
    )
    traced = trace(step, options((5, 0), uses_foreach=False))
    real = real_allocations(step)
    simulated = collections.Counter(
        event.num_bytes
        for event in traced.schedule.later.at(2)
        if event.action is Action.ALLOC
        and event.num_bytes > 512
        and event.origin.startswith("aten.")
    )
    assert simulated - real == collections.Counter()
    assert set(real - simulated) == cpu_only


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """Turn oneDNN off: its kernels repack tensors, unlike CUDA's and the plain CPU's."""
    was_enabled = torch._C._get_mkldnn_enabled()
    num_threads = torch.get_num_threads()
    # Each thread takes scratch of its own.
    torch.set_num_threads(1)
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)
        torch.set_num_threads(num_threads)


def real_allocations(step: TrainingStep) -> collections.Counter[int]:
    with without_onednn():
        prepared = step.prepare(torch.device("cpu"))
        prepared.begin()
        prepared.iterate(2)
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profiler:
            prepared.iterate(2)
    results = profiler.profiler.kineto_results.events()
    sizes = (event.nbytes() for event in results if event.name() == "[memory]")
    return collections.Counter(size for size in sizes if size > 512)


def test_counts_parameters_gradients_and_state() -> None:
    """AdamW with few activations has weights, gradients, two moments and a temporary."""
    traced = trace(step_of(mlp()), options())
    num_bytes = 4 * (64 * 256 + 256 + 256 * 10 + 10)
    setup = sum(event.num_bytes for event in traced.schedule.setup.events)
    assert setup == num_bytes
    assert 4.9 * num_bytes <= requested_peak(traced.schedule, 1) <= 5.2 * num_bytes


def test_sizes_are_affine_in_the_batch() -> None:
    """Every further sample adds the same to each tensor. Scratch memory has rules of its own."""
    few = trace(step_of("test_vit"), options())
    tensors = [
        [
            event.num_bytes
            for event in few.schedule.later.at(size)
            if type(event) is Event and event.action is Action.ALLOC
        ]
        for size in (1000, 2000, 3000)
    ]
    for one, two, three in zip(*tensors, strict=True):
        assert three - two == two - one >= 0
    peaks = [requested_peak(few.schedule, size) for size in (1000, 2000, 3000)]
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.01)
    assert peaks[1] > peaks[0]


def test_is_the_same_every_time() -> None:
    """The same step gives the same events, whatever the collector has left."""
    first = trace(step_of("test_vit"), options())
    cycles = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    for cycle in cycles:
        cycle.append(cycle)
    del cycles
    second = trace(step_of("test_vit"), options())
    assert first.schedule == second.schedule


def test_leaves_the_users_objects_alone() -> None:
    """The user's weights, gradients, optimizer state and flags stay, and torch's switches."""
    workload = mlp()
    model = workload.model
    optimizer = torch.optim.AdamW(model.parameters())
    live = Workload(model, workload.batch, workload.loss, optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    was_enabled = gc.isenabled()
    trace(step_of(live, Precision.AMP_FP16), options())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert not optimizer.state
    assert gc.isenabled() == was_enabled
    assert "meta" not in torch.utils._foreach_utils._get_foreach_kernels_supported_devices()


@pytest.mark.usefixtures("attention_written_out")
def test_attention_written_out_keeps_its_probabilities() -> None:
    """It keeps them in fp32 from the softmax, and in half precision for the second product."""
    step = step_of("test_vit", Precision.AMP_FP16)
    own = trace(step, options()).schedule
    assert any("_softmax" in event.origin for event in own.later.events)
    assert not any("scaled_dot_product" in event.origin for event in own.later.events)
    set_fused_attn(True)
    fused = trace(step, options()).schedule
    assert requested_peak(own, 64) > requested_peak(fused, 64)


def test_shared_parameters_stay_shared() -> None:
    """A tied weight is counted once."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    model[1].weight = model[0].weight
    workload = Workload(model, torch.zeros(2, 32), lambda out: out.sum(), "sgd")
    traced = trace(step_of(workload), options())
    assert sum(event.num_bytes for event in traced.schedule.setup.events) == 4 * 32 * 32


def test_gradient_checkpointing_keeps_less() -> None:
    """Recomputed activations are not held, and recomputation casts as forward did."""
    # The plans that cuDNN tries may need more than the activations, and both steps try the same.
    chosen = options(cudnn_benchmark=False)
    plain = trace(step_of("test_vit", Precision.AMP_BF16), chosen)
    spared = trace(step_of("test_vit", Precision.AMP_BF16, grad_checkpointing=True), chosen)
    assert requested_peak(spared.schedule, 64) < 0.8 * requested_peak(plain.schedule, 64)
    halves = [event for event in spared.schedule.later.events if "_to_copy" in event.origin]
    assert len(halves) > len([e for e in plain.schedule.later.events if "_to_copy" in e.origin])


def test_accumulation_holds_gradients_beside_activations() -> None:
    """Two micro-batches before a step need more memory than one."""
    one = trace(step_of("test_vit"), options())
    two = trace(step_of("test_vit", accumulate=True), options())
    assert requested_peak(two.schedule, 8) > requested_peak(one.schedule, 8)


def test_foreach_optimizers_hold_lists_of_temporaries() -> None:
    """This is as on CUDA, where foreach is the default."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    workload = Workload(model, torch.zeros(2, 64), lambda out: out.sum(), "adamw")
    one_by_one = trace(step_of(workload), options(uses_foreach=False))
    together = trace(step_of(workload), options())
    assert requested_peak(together.schedule, 1) > requested_peak(one_by_one.schedule, 1)


def test_prefetched_batches_grow_with_the_batch() -> None:
    """Two batches that wait are two more batches."""
    plain = trace(step_of(mlp()), options())
    fetched = trace(step_of(mlp(), prefetch=2), options())
    sample = 4 * 64 + 8
    more = sum(e.num_bytes for e in fetched.schedule.setup.at(100)) - sum(
        e.num_bytes for e in plain.schedule.setup.at(100)
    )
    assert more == 100 * 2 * sample


class ReadsValues(nn.Module):
    """Branches on the value of a tensor."""

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return data if data.sum().item() > 0 else -data


def test_a_step_that_needs_values_is_a_sentence() -> None:
    """The sentence names the module and the operation, and says what to do."""
    model = nn.Sequential(nn.Linear(8, 8), ReadsValues())
    workload = Workload(model, torch.zeros(2, 8), lambda out: out.sum(), "sgd")
    with pytest.raises(UnsupportedError, match=r"ReadsValues '1' needs the values.*item"):
        trace(step_of(workload), options())


def test_convolutions_take_workspaces_by_layout() -> None:
    """By the bound, contiguous half-precision tensors are transposed, and NHWC ones are not."""

    def workspaces(channels_last: bool) -> int:
        step = step_of("test_resnet", Precision.AMP_FP16, channels_last=channels_last)
        kernels = Kernels(compute_capability=(8, 0), asks_cudnn=False)
        bounded = dataclasses.replace(options(), kernels=kernels)
        events = trace(step, bounded).schedule.later.at(8)
        return sum(event.num_bytes for event in events if event.action is Action.ALLOC_IF_ROOM)

    assert workspaces(channels_last=True) == 0
    assert workspaces(channels_last=False) > 0


class Image(torch.Tensor):
    """A tensor with its own functions, like fastai's."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.AMP_FP16])
def test_tensors_with_functions_of_their_own_are_traced_as_plain_ones(precision: Precision) -> None:
    """Autocast and every allocation are the same."""

    def traced(images: torch.Tensor) -> StepTrace:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        workload = Workload(model, images, lambda out: out.square().mean(), "sgd")
        return trace(step_of(workload, precision), options())

    images = torch.zeros(2, 3, 8, 8)
    assert traced(images.as_subclass(Image)).schedule == traced(images).schedule
