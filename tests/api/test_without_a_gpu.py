"""Questions without a device and a card, on a machine without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import memfit
from memfit.api import steps
from memfit.cards import COMMON_GPUS
from memfit.errors import UsageError
from memfit.records import Plan, PlanSurvey, ProbeResult, Source, Survey

MODEL = "test_vit"
IMAGE = 96


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the GPU, if the machine has one."""
    monkeypatch.setattr(steps, "has_gpu", lambda: False)


def small_workload() -> memfit.Workload:
    batch = (torch.randn(2, 8), torch.randn(2, 1))
    return memfit.Workload(nn.Linear(8, 1), batch, nn.functional.mse_loss, "sgd")


@pytest.mark.parametrize("subject", [MODEL, small_workload()])
def test_probe_surveys_the_common_cards_and_says_so(subject: Any) -> None:
    """The CPU is never measured silently, neither for a name nor for a user's objects."""
    found = memfit.probe(subject, max_batch_size=8)
    assert isinstance(found, Survey)
    assert [answer.gpu for answer in found.answers] == list(COMMON_GPUS)
    assert found.source is Source.SIMULATED
    assert "There is no GPU here and none was named" in found.remarks[0]
    assert all(answer.result and answer.result.max_batch_size == 8 for answer in found.answers)


def test_plan_surveys_the_common_cards_and_says_so() -> None:
    """It follows the same rule as probe."""
    found = memfit.plan(MODEL, 64, image_size=IMAGE)
    assert isinstance(found, PlanSurvey)
    assert [answer.gpu for answer in found.answers] == list(COMMON_GPUS)
    assert "device='cpu'" in found.remarks[0]


def test_profile_simulates_a_card() -> None:
    """It is one card, because a profile is of one card."""
    found = memfit.profile(MODEL, 4, image_size=IMAGE)
    assert (found.device, found.source) == ("NVIDIA GeForce RTX 4090", Source.SIMULATED)


def test_memory_without_a_card_is_one_card_with_so_much() -> None:
    """The answer does not mention a dozen other cards."""
    probed = memfit.probe(MODEL, memory="2GiB", image_size=IMAGE)
    assert isinstance(probed, ProbeResult)
    assert probed.device == "any GPU"
    assert probed.capacity.total_bytes == 2 * 1024**3
    planned = memfit.plan(MODEL, 64, memory="2GiB", image_size=IMAGE)
    assert isinstance(planned, Plan)
    assert planned.device == "any GPU"
    survey = memfit.survey(MODEL, memory="2GiB", image_size=IMAGE)
    assert [answer.gpu for answer in survey.answers] == ["any GPU"]
    assert survey.remarks == ()
    plans = memfit.survey_plans(MODEL, 64, memory="2GiB", image_size=IMAGE)
    assert [answer.gpu for answer in plans.answers] == ["any GPU"]
    assert memfit.profile(MODEL, 4, memory="2GiB", image_size=IMAGE).device == "any GPU"


def test_a_cpu_is_measured_where_it_is_asked_for() -> None:
    """The user names it."""
    found = memfit.probe(small_workload(), device="cpu", memory="100MiB", max_batch_size=2)
    assert found.source is Source.MEASURED


def test_what_several_cards_do_not_have_points_to_what_they_have() -> None:
    """A survey is not taken for a result, nor a survey of plans for a plan."""
    survey = Survey(subject="net", answers=())
    with pytest.raises(AttributeError, match=r"'Survey' has no 'max_batch_size', .* in .answers"):
        _ = survey.max_batch_size  # type: ignore[attr-defined]
    plans = PlanSurvey(subject="net", effective_batch_size=8, world_size=1, answers=())
    with pytest.raises(AttributeError, match="give gpu="):
        _ = plans.micro_batch_size  # type: ignore[attr-defined]
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UsageError, match=r"training needs one plan. Plan again with gpu="):
        memfit.Accumulator(model, optimizer, plans, loss=nn.functional.mse_loss)  # type: ignore[arg-type]


def test_a_model_on_the_cpu_beside_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user probably forgot to move it."""
    monkeypatch.setattr(steps, "has_gpu", lambda: True)
    with pytest.raises(UsageError, match="Move the model to the GPU first"):
        memfit.probe(small_workload())
    with pytest.raises(UsageError, match="device='cpu'"):
        memfit.plan(small_workload(), 8)


def test_progress_of_a_survey_is_its_cards() -> None:
    """It gets each card before it is tried, and how many are done."""
    heard: list[tuple[str, int, int]] = []
    memfit.survey(
        MODEL,
        gpus=("t4", "rtx3090"),
        image_size=IMAGE,
        max_batch_size=2,
        progress=lambda *stage: heard.append(stage),
    )
    assert heard == [("Tesla T4", 0, 2), ("NVIDIA GeForce RTX 3090", 1, 2)]
    with pytest.raises(UsageError, match="progress is 'bar', a function or None, not 'loud'"):
        memfit.survey(MODEL, progress="loud")  # type: ignore[arg-type]


def test_progress_of_an_exploration_and_a_profile_are_their_stages() -> None:
    """Neither is silent for long."""
    heard: list[tuple[str, int, int]] = []
    memfit.explore(
        MODEL, 8, gpu="t4", image_size=IMAGE, progress=lambda *stage: heard.append(stage)
    )
    assert heard[0] == ("the step as it is", 0, len(heard))
    assert [done for _, done, _ in heard] == list(range(len(heard)))
    heard.clear()
    memfit.profile(
        MODEL, 2, gpu="t4", image_size=IMAGE, progress=lambda *stage: heard.append(stage)
    )
    assert [done for _, done, _ in heard] == [0, 1, 2]
