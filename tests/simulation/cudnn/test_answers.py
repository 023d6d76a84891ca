"""Each question is asked once, and answers outlive the process."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from memfit.backends.simulated import SimulatedBackend
from memfit.backends.traces import TraceCache
from memfit.cards import find_gpu
from memfit.records import Precision, StepOptions, WorkspaceSource
from memfit.simulation.cudnn import needs
from memfit.simulation.cudnn.answers import Workspaces
from memfit.simulation.cudnn.needs import WorkspaceRule
from memfit.simulation.cudnn.questions import Convolution, ConvolutionKernel
from memfit.step.training_step import TrainingStep
from memfit.step.workload import Workload

QUESTION = Convolution(
    kernel=ConvolutionKernel.DATA,
    dtype="float16",
    is_channels_last=True,
    input_shape=(2, 8, 9, 9),
    weight_shape=(4, 8, 3, 3),
    output_shape=(2, 4, 9, 9),
    padding=(1, 1),
    stride=(1, 1),
    dilation=(1, 1),
)


@dataclasses.dataclass
class Counted:
    """Answers the batch size times a thousand, and counts."""

    num_asked: int = 0

    def workspace_bytes(self, convolution: Convolution) -> int | None:
        self.num_asked += 1
        samples = convolution.input_shape[0]
        return None if samples == 3 else 1000 * samples


def sized(samples: int) -> Convolution:
    return dataclasses.replace(QUESTION, input_shape=(samples, 8, 9, 9))


def test_answers_are_kept(tmp_path: Path) -> None:
    """A second process asks nothing again, not even what has no plan."""
    path = tmp_path / "folder" / "answers.sqlite"
    first = Counted()
    workspaces = Workspaces(first, path=path)
    assert [workspaces.of(sized(n)) for n in (2, 3, 2, 3)] == [2000, None, 2000, None]
    workspaces.keep()
    assert first.num_asked == 2
    second = Counted()
    again = Workspaces(second, path=path)
    assert [again.of(sized(n)) for n in (2, 3)] == [2000, None]
    assert second.num_asked == 0


def test_a_broken_file_is_asked_again(tmp_path: Path) -> None:
    """It is replaced, and nothing is raised."""
    path = tmp_path / "answers.sqlite"
    path.write_bytes(b"no database" * 100)
    workspaces = Workspaces(Counted(), path=path)
    assert workspaces.of(sized(5)) == 5000
    workspaces.keep()
    second = Counted()
    assert Workspaces(second, path=path).of(sized(5)) == 5000
    assert second.num_asked == 0


def test_a_fork_opens_the_file_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open database must not be used by two processes at once."""
    path = tmp_path / "answers.sqlite"
    first = Workspaces(Counted(), path=path)
    first.of(sized(5))
    first.keep()
    counted = Counted()
    again = Workspaces(counted, path=path)
    again.of(sized(5))
    opened = again._opened_to_read()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert again._opened_to_read() is not opened
    assert again.of(sized(5)) == 5000
    assert counted.num_asked == 0


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    """Answers are still given."""
    (tmp_path / "file").write_text("")
    workspaces = Workspaces(Counted(), path=tmp_path / "file" / "answers.sqlite")
    assert workspaces.of(sized(4)) == 4000
    workspaces.keep()
    assert workspaces.of(sized(4)) == 4000


@pytest.mark.parametrize("answers", [None, Workspaces(Counted(), path=None)])
def test_without_an_answer_the_bound_holds(
    answers: Workspaces | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has so many bytes for each element of the three tensors."""
    monkeypatch.setattr(needs, "workspaces_of", lambda _: answers)
    rule = WorkspaceRule(convolution=QUESTION, bound_bytes_per_element=2)
    shapes = (3, 8, 9, 9, 4, 8, 3, 3, 3, 4, 9, 9)
    assert rule(find_gpu("rtx3090"), *shapes) == 2 * (3 * 8 * 81 + 4 * 8 * 9 + 3 * 4 * 81)


def resnet(card: str, *, is_rough: bool = False) -> tuple[SimulatedBackend, TrainingStep]:
    options = StepOptions(precision=Precision.FP32, optimizer="sgd")
    step = TrainingStep(subject="resnet10t", options=options)
    return SimulatedBackend(find_gpu(card), traces=TraceCache(), is_rough=is_rough), step


@pytest.mark.parametrize("is_known", [True, False])
def test_a_trial_says_how_workspaces_are_known(
    is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They add to what the step reserves, and a result says where they are from."""
    large = Workspaces(Counted(), path=None)
    monkeypatch.setattr(needs, "workspaces_of", lambda _: large if is_known else None)
    backend, step = resnet("rtx3090")
    expected = WorkspaceSource.CUDNN if is_known else WorkspaceSource.BOUND
    assert backend.trial(step, 4).workspaces is expected


def test_amds_cards_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not run cuDNN."""
    monkeypatch.setattr(needs, "workspaces_of", lambda _: Workspaces(Counted(), path=None))
    backend, step = resnet("mi300x")
    assert backend.trial(step, 4).workspaces is WorkspaceSource.BOUND


def test_a_step_without_convolutions_says_nothing() -> None:
    """There is nothing to know."""
    backend, _ = resnet("rtx3090")
    model = torch.nn.Linear(4, 4)
    workload = Workload(model, torch.zeros(2, 4), lambda out: out.sum(), "sgd")
    step = TrainingStep(subject=workload, options=StepOptions(precision=Precision.FP32))
    assert backend.trial(step, 4).workspaces is None


def test_a_scout_asks_at_few_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It scales their answers, which comes close."""
    counted = Counted()
    answers = Workspaces(counted, path=None)
    monkeypatch.setattr(needs, "workspaces_of", lambda _: answers)
    rough, step = resnet("rtx3090", is_rough=True)
    exact, _ = resnet("rtx3090")
    roughly = [rough.trial(step, size).peak_reserved_bytes for size in range(100, 110)]
    num_rough = counted.num_asked
    exactly = [exact.trial(step, size).peak_reserved_bytes for size in range(100, 110)]
    assert num_rough * 4 < counted.num_asked - num_rough
    assert roughly == pytest.approx(exactly, rel=0.02)
