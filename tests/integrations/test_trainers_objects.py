"""Trainers' own objects are workloads: their batch sizes are those that the trainers train with."""

from __future__ import annotations

import copy
import gc
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import memfit
from integrations import zoo
from memfit.api.asking import Asked
from memfit.api.cards import Cards
from memfit.api.steps import describe
from memfit.backends.rehearsed import RehearsalServers
from memfit.backends.rehearsed.parcel import packed
from memfit.cards import find_gpu
from memfit.errors import UnsupportedError, UsageError, WorkloadError
from memfit.integrations.objects import subject_of
from memfit.integrations.train_args import read_train_arguments
from memfit.planning import probe_on
from memfit.records import Engine, GradientFault, Precision
from memfit.rehearsal.activate import rehearsed_environment
from memfit.units import MIB, parse_bytes

pytestmark = pytest.mark.filterwarnings("default")

FASTAI = pytest.mark.needs("fastai")
LIGHTNING = pytest.mark.needs("pytorch_lightning")
TRANSFORMERS = pytest.mark.needs("transformers", "accelerate")
CASES = [
    pytest.param("lightning", "rtx3060", "1GiB", marks=LIGHTNING),
    pytest.param("lightning", "a100-40gb", "2GiB", marks=LIGHTNING),
    pytest.param("transformers", "rtx3060", "1GiB", marks=TRANSFORMERS),
]
ACCELERATE = pytest.mark.needs("accelerate")
MORE_CASES = [
    pytest.param("fastai", "rtx3060", "fp32", marks=FASTAI),
    pytest.param("fastai", "a100-40gb", "amp-fp16", marks=FASTAI),
    pytest.param("timm", "a100-40gb", "amp-bf16"),
    pytest.param("timm", "rtx3060", "fp32"),
    pytest.param("transformers", "a100-40gb", "amp-fp16", marks=TRANSFORMERS),
    pytest.param("accelerate", "rtx3060", "amp-fp16", marks=ACCELERATE),
    pytest.param("accelerate", "a100-40gb", "amp-fp16", marks=ACCELERATE),
    pytest.param("lightning", "rtx3060", "amp-fp16", marks=LIGHTNING),
]


def subject(name: str, *, precision: Precision = Precision.FP32) -> tuple[Any, dict[str, Any]]:
    """Return a trainer's own object, and what is given beside it."""
    if name == "timm":
        amp = "" if precision is Precision.FP32 else "--amp --amp-dtype bfloat16"
        read = read_train_arguments(
            f"--model {zoo.TIMM_MODEL} --img-size {zoo.TIMM_SIZE} --num-classes {zoo.NUM_CLASSES} "
            + amp
        )
        return read.model, dict(read.keywords)
    if name == "accelerate":
        workload = memfit.Workload(zoo.Net(), zoo.images(4).tensors, zoo.Fp32Loss(), "adamw")
        return workload, {"accumulate": True, "precision": precision.value, "headroom": 0.05}
    if name == "fastai":
        return zoo.in_precision(zoo.learner(), precision.value), {}
    if name == "lightning":
        trainer = zoo.lightning_trainer(precision=zoo.LIGHTNING[precision.value])
        loader = DataLoader(zoo.images(8), batch_size=4)
        beside = {"datamodule": loader, "trainer": trainer}
        # A Trainer that is made without a GPU turns fp16 into bf16.
        is_half = precision is Precision.AMP_FP16
        return zoo.lightning_module(), {**beside, **({"precision": "amp-fp16"} if is_half else {})}
    zoo.reset_accelerate()
    kinds: dict[str, Any] = {kind: precision.value == f"amp-{kind}" for kind in ("bf16", "fp16")}
    return zoo.transformers_trainer(**kinds), {}


TRAINERS = (
    pytest.param("fastai", marks=FASTAI),
    pytest.param("lightning", marks=LIGHTNING),
    pytest.param("transformers", marks=TRANSFORMERS),
)


@pytest.fixture(scope="module")
def servers() -> Iterator[RehearsalServers]:
    """Return the process in which trainers train on cards that are not there."""
    with RehearsalServers(lambda card: rehearsed_environment(card, environment=os.environ)) as made:
        yield made


@pytest.mark.rehearses
@pytest.mark.parametrize(("name", "card", "memory"), CASES)
def test_the_named_batch_size_trains_and_one_more_sample_does_not(
    servers: RehearsalServers, name: str, card: str, memory: str
) -> None:
    """The trainer's own loop runs on the same card, rehearsed; importing it takes seconds."""
    made, beside = subject(name)
    found = memfit.probe(made, gpu=card, memory=memory, engine="rehearse", progress=None, **beside)
    gpu = find_gpu(card, total_bytes=parse_bytes(memory))
    servers.open(gpu)
    trained = [
        servers.call("integrations.zoo:trains", None, name, batch_size, {})
        for batch_size in (found.max_batch_size, found.max_batch_size + 1)
    ]
    servers.close()
    assert trained == [True, False]


@pytest.fixture(scope="module")
def cards() -> Iterator[Cards]:
    """Return cards that are rehearsed in one process, because each start takes seconds."""
    with Cards(Engine.REHEARSE) as made:
        yield made


@pytest.mark.rehearses
@pytest.mark.parametrize(("name", "card", "precision"), MORE_CASES)
def test_so_it_is_in_mixed_precision_and_other_loops(
    cards: Cards, servers: RehearsalServers, name: str, card: str, precision: str
) -> None:
    """fastai's `fit`, with its scaler too, and the order of calls in timm's train.py.

    It trains in a process of its own: the one of the trials keeps the model of the trials.
    """
    made, beside = subject(name, precision=Precision(precision))
    asked = Asked.of(made, **{"memory": "1GiB", "headroom": 0.0, **beside})
    found = probe_on(cards.open(card, asked.memory_bytes, asked.step), asked.step, asked.search)
    assert found.options.precision.value == precision
    servers.open(find_gpu(card, total_bytes=asked.memory_bytes))
    trained = [
        servers.call("integrations.zoo:trains", None, name, size, {"precision": precision})
        for size in (found.max_batch_size, found.max_batch_size + 1)
    ]
    servers.close()
    assert trained == [True, False]


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.AMP_BF16])
def test_a_simulation_knows_the_trainers_precision(name: str, precision: Precision) -> None:
    """It is shown as chosen, and mixed precision lets larger batches fit."""
    made, beside = subject(name, precision=precision)
    found = memfit.probe(made, gpu="rtx3060", memory="1GiB", progress=None, **beside)
    assert found.options.precision is precision
    low, high = (400, 520) if precision is Precision.FP32 else (480, 900)
    assert low < found.max_batch_size < high
    assert found.subject == ("Wrapped" if name == "transformers" else type_name(name))


def type_name(name: str) -> str:
    return {"fastai": "Net", "lightning": "Module"}[name]


def bits_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", TRAINERS)
def test_everything_is_put_back_after_trials_on_the_cpu(name: str) -> None:
    """Weights, modes, gradients, generators and the objects' attributes are as before."""
    made, beside = subject(name)
    model = made if name == "lightning" else made.model
    model.eval()
    before, random = bits_of(model), torch.get_rng_state()
    attributes = {key: copy.copy(value) for key, value in vars(made).items() if is_simple(value)}
    names = set(vars(made))
    found = memfit.probe(
        made, device="cpu", memory="400MiB", max_batch_size=8, progress=None, **beside
    )
    assert found.max_batch_size == 8
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in bits_of(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert set(vars(made)) == names
    assert {key: vars(made)[key] for key in attributes} == attributes


def is_simple(value: object) -> bool:
    return isinstance(value, (int, float, str, bool, type(None)))


@TRANSFORMERS
def test_a_planned_step_has_all_its_samples_on_the_device() -> None:
    """transformers puts them there, so they leave less room for a micro-batch."""
    made, _ = subject("transformers")
    plan = memfit.plan(made, 4096, gpu="rtx3060", memory="1GiB", progress=None)
    found = memfit.probe(made, gpu="rtx3060", memory="1GiB", accumulate=True, progress=None)
    # 4,096 images of 48 KiB are 192 MiB.
    assert plan.max_micro_batch_size < 0.85 * found.max_batch_size


@FASTAI
def test_a_learners_phases_have_their_own_batch_sizes() -> None:
    """A frozen body needs no gradients and keeps no activations."""
    learn = zoo.learner(splitter=lambda net: [list(net.body.parameters()), [*net.out.parameters()]])
    sizes = []
    for phase in (learn.freeze, learn.unfreeze):
        phase()
        found = memfit.probe(learn, gpu="rtx3060", memory="1GiB", progress=None)
        sizes.append(found.max_batch_size)
    assert sizes[0] > 1.5 * sizes[1]


@LIGHTNING
def test_a_learners_data_stays_here() -> None:
    """fastai's callbacks have the learner, and so its data, which a process may not take."""
    learn = zoo.learner()
    learn.dls.train.dataset.lock = threading.Lock()
    learn.dls.train.dataset.large = torch.zeros(20 * MIB, dtype=torch.uint8)
    assert len(packed(describe(subject_of(learn)))) < 10 * MIB


def test_the_other_functions_take_them_too() -> None:
    """One trial, and a profile, in a simulation."""
    made, beside = subject("lightning")
    trial = memfit.estimate(made, 8, gpu="rtx3060", engine="simulate", **beside)
    assert trial.fits
    profile = memfit.profile(made, 8, gpu="rtx3060", engine="simulate", progress=None, **beside)
    assert profile.batch_size == 8


class Mean(torch.nn.Module):
    """A very small net, with or without a layer that mixes samples."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 16, stride=16)
        self.norm = norm
        self.out = torch.nn.Linear(4, zoo.NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, classes)."""
        scores: torch.Tensor = self.out(self.norm(self.stem(x)).mean((2, 3)))
        return scores


@pytest.mark.parametrize("name", TRAINERS)
def test_verify_compares_the_gradients_of_a_trainers_step(name: str) -> None:
    """Batch norm is named in Lightning's module; the others have none and are equal."""
    mixes = name == "lightning"
    net = Mean(torch.nn.BatchNorm2d(4) if mixes else torch.nn.GroupNorm(2, 4))
    beside: dict[str, Any] = {}
    if name == "fastai":
        made = zoo.learner(model=net)
    elif mixes:
        made = zoo.lightning_module(model=net)
        beside = {"datamodule": DataLoader(zoo.images(8), batch_size=4)}
    else:
        zoo.reset_accelerate()
        made = zoo.transformers_trainer(model=zoo.Wrapped(net))
    found = memfit.verify(
        made, micro_batch_size=3, accumulation_steps=2, device="cpu", progress=None, **beside
    )
    assert found.equal is not mixes
    faults = {GradientFault.MIXES_SAMPLES} if mixes else set()
    assert set(found.faults) - {GradientFault.CARRIES_STATE} == faults
    assert [layer.name for layer in found.mixing_layers] == ["model.net.norm"] * mixes


@FASTAI
@LIGHTNING
def test_what_a_trial_cannot_run_is_refused_in_a_sentence() -> None:
    """The sentence says what to do instead."""
    from fastai.callback.mixup import MixUp

    learn = zoo.learner(cbs=MixUp())
    with pytest.raises(UnsupportedError, match=r"MixUp changes what a step .* memfit rehearse"):
        memfit.probe(learn, gpu="rtx3060")
    module = zoo.lightning_module()
    with pytest.raises(UsageError, match=r"no train_dataloader of its own: give datamodule="):
        memfit.probe(module, gpu="rtx3060")
    module.automatic_optimization = False
    with pytest.raises(UnsupportedError, match="steps its optimizers itself"):
        memfit.probe(module, gpu="rtx3060")
    with pytest.raises(
        UsageError, match="datamodule= goes with a LightningModule, not with 'resnet18'"
    ):
        memfit.probe("resnet18", gpu="rtx3060", datamodule=object())
    made, beside = subject("lightning")
    with pytest.raises(UsageError, match="trainer= must be a Lightning Trainer, not int"):
        memfit.probe(made, gpu="rtx3060", datamodule=beside["datamodule"], trainer=3)
    with pytest.raises(UnsupportedError, match="no trials in Lightning's precision '64-true'"):
        trainer = zoo.lightning_trainer(precision="64-true")
        memfit.probe(made, gpu="rtx3060", datamodule=beside["datamodule"], trainer=trainer)
    with pytest.raises(WorkloadError, match="fewer samples than one batch"):
        memfit.probe(made, gpu="rtx3060", datamodule=DataLoader(zoo.images(2), 4, drop_last=True))


def test_other_objects_are_left_as_they_are() -> None:
    """A class that is only named like a trainer's is not one."""

    class Trainer:
        pass

    one = Trainer()
    assert subject_of(one) is one
    assert subject_of("resnet18") == "resnet18"
    gc.collect()
