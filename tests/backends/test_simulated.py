"""Simulated GPUs: the backend, the public functions and the commands."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pinned import IS_PINNED
from torch import nn

import memfit
from memfit import search
from memfit.backends import Prediction, traces
from memfit.backends.simulated import SimulatedBackend
from memfit.backends.traces import TraceCache
from memfit.cards import find_gpu
from memfit.cli import main
from memfit.errors import DoesNotFitError, UnsupportedError, UsageError
from memfit.records import Outcome, Precision, Source, StepOptions
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.step.training_step import TrainingStep
from memfit.units import GIB, KIB, MIB

MODEL = "test_vit"


def step(precision: Precision = Precision.AMP_BF16) -> TrainingStep:
    return TrainingStep(subject=MODEL, options=StepOptions(precision=precision, optimizer="adamw"))


def test_an_answer_is_proved_and_says_simulated() -> None:
    """One sample more runs out, and nothing claims to be measured."""
    result = memfit.probe(MODEL, gpu="rtx3070")
    assert result.source is Source.SIMULATED
    assert result.device == "NVIDIA GeForce RTX 3070"
    assert all(trial.source is Source.SIMULATED for trial in result.trials)
    assert all(trial.step_seconds is None for trial in result.trials)
    assert result.edge_found
    more = result.trial_at(result.max_batch_size + 1)
    assert more is not None
    assert more.outcome is Outcome.OUT_OF_MEMORY
    assert result.capacity.origin.startswith("simulated: ")
    assert result.to_dict()["source"] == "simulated"


def test_an_amd_card_is_not_exact() -> None:
    """AMD's cards are simulated with NVIDIA's kernels, and each trial says so."""
    assert memfit.estimate(MODEL, 8, gpu="mi300x").is_approximate
    assert not memfit.estimate(MODEL, 8, gpu="rtx3070").is_approximate


def test_an_estimate_is_one_trial() -> None:
    """It grows with the batch, and runs out where the card does."""
    small = memfit.estimate(MODEL, 8, gpu="any", memory="2GiB")
    large = memfit.estimate(MODEL, 4000, gpu="any", memory="2GiB")
    assert small.fits
    assert large.outcome is Outcome.OUT_OF_MEMORY
    assert large.message is not None
    assert "ran out of memory" in large.message
    with pytest.raises(UsageError, match="at least 1, not 0"):
        memfit.estimate(MODEL, 0, gpu="3090")


def test_a_replay_with_other_options_is_another_one() -> None:
    """Backends that share traces may have other options of the allocator."""
    shared = TraceCache()
    peaks = [
        SimulatedBackend(
            find_gpu("3090"),
            settings=AllocatorSettings(large_segment_bytes=size * MIB),
            traces=shared,
        )
        .trial(step(), 8)
        .peak_reserved_bytes
        for size in (20, 64)
    ]
    assert peaks[0] != peaks[1]


def test_more_memory_takes_more() -> None:
    """The same card with its memory overridden."""
    sizes = [
        memfit.probe(MODEL, gpu="3090", memory=memory).max_batch_size for memory in ("4GiB", "8GiB")
    ]
    assert sizes[1] > 1.9 * sizes[0]


def test_cards_share_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards that would make the same trace share one; other cards get another."""
    traced = []
    original = traces.trace

    def counted(*args: object, **kwargs: object) -> object:
        traced.append(args)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(traces, "trace", counted)
    survey = memfit.survey(MODEL, gpus=("rtx3090", "rtx4090", "a100", "3060"))
    assert len(traced) == 1
    assert [answer.gpu for answer in survey.answers][:1] == ["NVIDIA GeForce RTX 3090"]
    memfit.survey(MODEL, gpus=("rtx3090", "t4"))
    assert len(traced) == 3


def test_an_answer_does_not_depend_on_who_was_asked_before() -> None:
    """A card has the same answer alone and among others."""
    alone = memfit.survey(MODEL, gpus=("rtx3090",)).answers[0].result
    among = memfit.survey(MODEL, gpus=("rtx4090", "t4", "rtx3090")).answers[2].result
    assert alone is not None
    assert among is not None
    assert alone.trials == among.trials


def test_the_allocators_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of a training run are read, and a wrong value gets a sentence."""
    sizes = (8, 64, 100)  # one of them may reserve the same by chance
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    expandable = [memfit.estimate(MODEL, size, gpu="3090") for size in sizes]
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    native = [memfit.estimate(MODEL, size, gpu="3090") for size in sizes]
    for one, other in zip(expandable, native, strict=True):
        assert one.peak_requested_bytes == other.peak_requested_bytes
    reserved = [[trial.peak_reserved_bytes for trial in found] for found in (expandable, native)]
    assert reserved[0] != reserved[1]
    if IS_PINNED:
        assert reserved[0][sizes.index(64)] != reserved[1][sizes.index(64)]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:maybe")
    with pytest.raises(UsageError, match="'maybe' is not a value"):
        memfit.estimate(MODEL, 64, gpu="3090")


def test_memory_does_not_grow_with_the_batch() -> None:
    """A batch of terabytes is a replay of the same trace."""
    backend = SimulatedBackend(find_gpu("3090"), traces=TraceCache())
    backend.trial(step(), 8)
    held_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    needed = backend.needed_bytes(step(), 2_000_000)
    assert needed is not None
    assert needed > 1000 * GIB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held_kib < 64 * KIB


_PRINTS_AN_ANSWER = f"""
import memfit
print([trial.to_dict() for trial in memfit.probe({MODEL!r}, gpu="rtx3090").trials])
"""


def test_an_answer_is_the_same_in_another_process() -> None:
    """Hash order, the number of threads and a visible GPU change nothing."""
    changes = {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-c", _PRINTS_AN_ANSWER],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | changes,
    )
    here = [trial.to_dict() for trial in memfit.probe(MODEL, gpu="rtx3090").trials]
    assert run.stdout.strip() == str(here)


def test_a_conv_nets_search_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workspaces depend on the free room, and the hint knows this because it was replayed.

    Three trials prove the edge; the trials after them look for the recommendation.
    """
    found: list[search.Found] = []
    original = search.find_largest

    def recorded(*args: Any, **kwargs: Any) -> search.Found:
        found.append(original(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(search, "find_largest", recorded)
    for gpu in ("rtx3090", "a100", "rtx4080", "t4"):
        result = memfit.probe("resnet10t", gpu=gpu, image_size=96)
        assert result.edge_found
        assert len(found[-1].trials) <= 3


def test_the_hint_is_an_edge_under_the_capacity() -> None:
    """The hint fits, and one sample more runs out."""
    backend = SimulatedBackend(find_gpu("3070"), memory_bytes=GIB)
    edge = backend.expected_edge(step())
    assert edge is not None
    assert backend.trial(step(), edge).fits
    assert not backend.trial(step(), edge + 1).fits


def test_precision_is_the_cards_own() -> None:
    """It is bf16 from Ampere on, and fp16 before."""
    assert memfit.probe(MODEL, gpu="t4").options.precision is Precision.AMP_FP16
    assert memfit.probe(MODEL, gpu="l4").options.precision is Precision.AMP_BF16


def test_needed_bytes_and_does_not_fit() -> None:
    """If batch size 1 does not fit, the message says how much it would take."""
    backend = SimulatedBackend(
        find_gpu("3090"), memory_bytes=64 * MIB, settings=AllocatorSettings(), traces=TraceCache()
    )
    needed = backend.needed_bytes(step(), 4096)
    assert needed is not None
    assert needed > 64 * MIB
    with pytest.raises(DoesNotFitError, match=r"resnet18 does not fit even at batch size 1"):
        memfit.probe("resnet18", gpu="h200", memory="700MiB")


def test_without_cudnn_a_step_is_not_simulated() -> None:
    """Its convolutions have other kernels, which a rehearsal runs."""
    with (
        torch.backends.cudnn.flags(enabled=False),
        pytest.raises(UnsupportedError, match=r"cudnn\.enabled is False.*Rehearse it"),
    ):
        memfit.estimate("resnet10t", 2, gpu="rtx3060", engine="simulate", image_size=32)


def test_gpu_and_device_exclude_each_other() -> None:
    """Only one of them can be given."""
    with pytest.raises(UsageError, match="not both"):
        memfit.probe(MODEL, gpu="3090", device="cpu")


class Branches(nn.Module):
    """A model that needs the values of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(data)
        return output[output.sum(1) > 0]


def test_a_users_workload_is_simulated_untouched() -> None:
    """Its parameters are not moved, and an operation that needs values is named."""
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 2))
    workload = memfit.Workload(
        model, (torch.zeros(2, 8), torch.zeros(2, dtype=torch.long)), nn.CrossEntropyLoss(), "sgd"
    )
    assert memfit.estimate(workload, 64, gpu="3090").fits
    assert next(model.parameters()).device.type == "cpu"
    branching = memfit.Workload(Branches(), torch.zeros(2, 8), lambda out: out.sum(), "sgd")
    with pytest.raises(UnsupportedError, match="Branches"):
        memfit.estimate(branching, 4, gpu="3090")


@pytest.mark.parametrize(
    ("model", "image_size", "fits_at_64"),
    [
        ("convnext_large", "320x240", False),
        ("vit_large_patch16_224", "224", False),
        ("swin_large_patch4_window7_224", "224", False),
        ("swinv2_large_window12_192", "192", False),
        ("convnext_small", "128", True),
    ],
)
@pytest.mark.usefixtures("attention_written_out")
def test_the_courses_case(model: str, image_size: str, fits_at_64: bool) -> None:
    """On 16,280 MiB in fp16 with Adam and 10 classes, some models fitted at 32 and not at 64.

    The course found this by hand on real cards in 2022, before attention was fused.
    """
    outcomes = [
        memfit.estimate(
            model,
            batch_size,
            gpu="p100",
            memory="16280MiB",
            precision="amp-fp16",
            optimizer="adam",
            num_classes=10,
            image_size=image_size,
        ).fits
        for batch_size in (32, 64)
    ]
    assert outcomes == [True, fits_at_64]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.output


def test_command_simulates_a_named_gpu() -> None:
    """The table and the JSON both say simulated."""
    code, output = run("probe", MODEL, "--gpu", "RTX 3070")
    assert code == 0
    assert "NVIDIA GeForce RTX 3070" in output
    assert "Simulated in" in output
    assert "easured" not in output
    code, output = run("probe", MODEL, "--gpu", "RTX 3070", "--json")
    assert json.loads(output)["results"][0]["source"] == "simulated"


def test_command_surveys_several_gpus() -> None:
    """One table needs as few traces as possible, and what does not fit says so."""
    code, output = run("probe", MODEL, "--gpu", "3070", "--gpu", "h200")
    assert code == 0
    assert "NVIDIA H200" in output
    assert "Simulated, not measured" in output
    little = ("probe", "resnet18", "--gpu", "3060", "--gpu", "h200", "--memory", "800MiB")
    code, output = run(*little, "--json")
    results = json.loads(output)["results"]
    assert [result["max_batch_size"] is None for result in results] == [False, True]
    code, output = run(*little)
    assert "does not fit" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, probe measures")
def test_command_without_a_gpu_simulates_common_ones() -> None:
    """They are a dozen cards from 8 to 141 GB."""
    code, output = run("probe", MODEL)
    assert code == 0
    table = output.partition("Simulated, not measured")[0]
    assert table.count("NVIDIA") + table.count("Tesla") == 12


def test_command_lists_the_catalogue() -> None:
    """It lists all cards, one card, or the nearest name."""
    code, output = run("gpus")
    assert code == 0
    assert "RTX 3090" in output
    code, output = run("gpus", "h100", "--json")
    assert json.loads(output)["results"][0]["total_bytes"] > 79 * GIB
    code, output = run("gpus", "rtx3091")
    assert code == 2
    assert "did you mean" in output


def test_a_gpu_that_is_there_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search gets the prediction as its hint, and the table shows both."""
    from memfit.api import asking

    class Posing(SimulatedBackend):
        """Stands in for a real card."""

        def prediction(self, step: TrainingStep) -> Prediction:
            simulated = SimulatedBackend(self.gpu, memory_bytes=self.capacity().usable_bytes)
            edge = simulated.expected_edge(step)
            return Prediction(batch_size=edge, step=step, simulated=simulated)

    posing = Posing(find_gpu("3090"), memory_bytes=4 * GIB)
    monkeypatch.setattr(asking, "open_backend", lambda *_args, **_kwargs: posing)
    result = memfit.probe(MODEL, device="cuda")
    assert len(result.trials) <= 12
    assert [t.batch_size for t in result.predictions] == list(
        dict.fromkeys(t.batch_size for t in result.trials)
    )
    from rich.console import Console

    from memfit.reports.probe import render

    console = Console(width=120, record=True)
    console.print(render(result))
    assert "predicted" in console.export_text()
