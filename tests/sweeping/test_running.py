"""A sweep: its figures, its journal, and what an interruption leaves."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import memfit
from memfit.backends.simulated import SimulatedBackend
from memfit.cards import find_gpu
from memfit.errors import UsageError
from memfit.records import Precision, StepOptions, SweepRow
from memfit.simulation.cudnn import needs
from memfit.step.training_step import TrainingStep
from memfit.sweeping import running
from memfit.sweeping.journal import Journal
from memfit.sweeping.tasks import SweepTask, facts_of
from memfit.sweeping.workers import LocalPool

GPUS = ("rtx3060", "t4")
SMALL = ("test_vit", "test_efficientnet_gn@96")
ANSWERS: dict[str, Any] = {}


class Here:
    """Runs tasks in this process, which the tests can look into.

    Args:
        interrupted_after: Raise what Ctrl-C raises after so many answers.
    """

    def __init__(self, interrupted_after: int | None = None) -> None:
        self.interrupted_after = interrupted_after
        self.asked: list[str] = []

    def run(self, tasks: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        # The last is answered first: answers come in any order.
        for num_done, task in enumerate(reversed(tasks)):
            if num_done == self.interrupted_after:
                raise KeyboardInterrupt
            self.asked.append(task.model)
            # The same step has the same answer, so that it is traced once for all tests.
            if task.key not in ANSWERS:
                ANSWERS[task.key] = task.run()
            yield task, ANSWERS[task.key]


def swept(
    monkeypatch: pytest.MonkeyPatch, pool: Here, models: Sequence[str] = SMALL, **options: Any
) -> memfit.Sweep:
    monkeypatch.setattr(running, "pool_for", lambda *_args, **_options: pool)
    given = {"gpus": GPUS, "precisions": ["amp-fp16"], "progress": None, **options}
    return memfit.sweep(models, **given)


def test_each_card_chooses_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `auto`, the default, the model is counted before any card has chosen."""
    found = swept(monkeypatch, Here(), ["test_vit"], precisions=["auto"])
    assert [(row.options.precision.value, row.reason) for row in found.rows] == [
        ("amp-bf16", None),
        ("amp-fp16", None),
    ]
    assert all(row.max_batch_size and row.num_parameters for row in found.rows)


def test_rows_are_what_a_survey_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in the order of the question, with what a model has on every card."""
    found = swept(monkeypatch, Here())
    assert [(row.model, row.device) for row in found.rows] == [
        (name.partition("@")[0], gpu)
        for name in SMALL
        for gpu in ("NVIDIA GeForce RTX 3060", "Tesla T4")
    ]
    survey = memfit.survey("test_vit", gpus=["rtx3060", "t4"], precision="amp-fp16", progress=None)
    for row, answer in zip(found.rows, survey.answers, strict=False):
        assert answer.result is not None
        assert row.max_batch_size == answer.result.max_batch_size
        assert row.recommended_batch_size == answer.result.recommended_batch_size
        assert row.num_parameters == 371_240
        assert row.forward_flops is not None
        assert row.forward_flops > 70_000_000
        assert row.bytes_per_sample is not None
        whole = row.bytes_per_sample * (row.max_batch_size or 0)
        assert whole == pytest.approx(answer.result.capacity_bytes, rel=0.1)
    assert found.rows[2].options.image_size == (96, 96)


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "sequencer2d_s"])
def test_operations_are_those_of_torchs_counter(model: str) -> None:
    """A card's trace, and a forward pass without a card, count what torch's counter counts."""
    step = TrainingStep(subject=model, options=StepOptions(precision=Precision.FP32))
    built = timm.create_model(model).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(torch.empty(2, *built.pretrained_cfg["input_size"], device="meta"))
    facts = facts_of(step)
    assert facts.forward_flops == counter.get_total_flops() // 2
    # Two micro-batches, of which one sample is counted once.
    accumulating = dataclasses.replace(step.options, accumulate=True)
    on_card = dataclasses.replace(step, options=accumulating)
    assert SimulatedBackend(find_gpu("rtx3090")).facts(on_card) == facts


def test_a_quick_sweep_asks_no_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its figures are those of a machine where cuDNN cannot be asked, and it says so."""
    found = swept(monkeypatch, Here(), ["test_resnet"], gpus=["t4"], quick=True)
    assert found.is_quick
    asked = swept(monkeypatch, Here(), ["test_resnet"], gpus=["t4"])
    assert not asked.is_quick
    monkeypatch.setattr(needs, "_answers", lambda _: None)
    step = SweepTask(model="test_resnet", gpus=("t4",), options={"precision": "amp-fp16"})
    (bound,) = step.run()
    (quick,) = found.rows
    assert quick.max_batch_size == bound.max_batch_size
    assert quick.recommended_batch_size == pytest.approx(bound.recommended_batch_size, rel=0.01)
    assert quick.max_batch_size == pytest.approx(asked.rows[0].max_batch_size, rel=0.03)


def test_a_failure_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on."""
    found = swept(monkeypatch, Here(), ["qwen3_vit_88m_enc", "test_vit"])
    first, _, third, _ = found.rows
    assert first.max_batch_size is None
    assert "classifier" in (first.reason or "")
    assert third.max_batch_size is not None


def test_lists_are_combined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every combination is a step."""
    found = swept(
        monkeypatch,
        Here(),
        ["test_vit"],
        gpus=["t4"],
        precisions=["fp32", "amp-fp16"],
        optimizers=["sgd", "adamw"],
    )
    assert [(row.options.precision.value, row.options.optimizer) for row in found.rows] == [
        ("fp32", "sgd"),
        ("fp32", "adamw"),
        ("amp-fp16", "sgd"),
        ("amp-fp16", "adamw"),
    ]


def test_an_interrupted_sweep_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second call asks only what is missing, and its result is that of one call."""
    models = (*SMALL, "test_convnext")
    journal = tmp_path / "journal.jsonl"
    first = swept(monkeypatch, Here(interrupted_after=1), models, journal=journal)
    assert not first.is_complete
    assert {row.model for row in first.rows} == {"test_convnext"}
    with journal.open("a") as file:
        file.write('{"key": "half a li')
    rest = Here()
    second = swept(monkeypatch, rest, models, journal=journal)
    assert rest.asked == ["test_efficientnet_gn", "test_vit"]
    assert second == swept(monkeypatch, Here(), models)
    assert swept(monkeypatch, Here(interrupted_after=0), models, journal=journal) == second


def test_another_version_does_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same step is asked again."""
    journal = tmp_path / "journal.jsonl"
    swept(monkeypatch, Here(), ["test_vit"], journal=journal)
    monkeypatch.setattr(memfit, "__version__", "9.9")
    again = Here()
    swept(monkeypatch, again, ["test_vit"], journal=journal)
    assert again.asked == ["test_vit"]


def test_a_journal_is_not_any_file(tmp_path: Path) -> None:
    """A file of something else is refused, and is not changed."""
    path = tmp_path / "notes.txt"
    path.write_text("dear diary\n")
    with pytest.raises(UsageError, match="is not the journal"), Journal(path, SweepRow, {}):
        pass
    assert path.read_text() == "dear diary\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precisions": ["fp99"]}, "no precision 'fp99'"),
        ({"precisions": "fp32"}, "must be a list"),
        ({"optimizers": ["adamx"]}, "no optimizer 'adamx'"),
        ({"gpus": ["rtx9999"]}, "no GPU 'rtx9999'"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"workers": 1, "ray": "auto"}, "workers or ray"),
        ({"memory": "some"}, "not a size"),
        ({"quick": True, "engine": "rehearse"}, "quick is for simulated cards"),
    ],
)
def test_mistakes_are_found_before_anything_runs(options: dict[str, Any], words: str) -> None:
    """Each has one sentence."""
    with pytest.raises(UsageError, match=words):
        memfit.sweep("test_vit", progress=None, **options)


class Deadly(SweepTask):
    """A task that ends its process, as the system does when there is no memory left."""

    def run(self) -> tuple[SweepRow, ...]:
        os.kill(os.getpid(), signal.SIGKILL)
        return ()


def test_a_killed_worker_costs_one_answer() -> None:
    """Its row says how it ended, and another process answers the rest."""
    options = {"precision": "fp32"}
    tasks = [
        Deadly(model="resnet18", gpus=("t4",), options=options),
        SweepTask(model="test_vit", gpus=("t4",), options=options),
    ]
    answers = {task.model: rows for task, rows in LocalPool(1).run(tasks)}
    assert "signal 9" in (answers["resnet18"][0].reason or "")
    assert answers["test_vit"][0].max_batch_size
