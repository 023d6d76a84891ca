"""The public functions, end to end on the CPU."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
from torch import nn

import memfit
from memfit import Outcome, Precision, ProbeResult, Source, Trial, Workload
from memfit.errors import DoesNotFitError, UsageError
from memfit.units import MIB


def proved(result: ProbeResult) -> bool:
    """Return whether the largest size was tried and fitted, and one sample more ran out."""
    tried = [(trial.batch_size, trial.fits) for trial in result.trials]
    return (
        result.edge_found
        and result.trial_at(result.max_batch_size) is not None
        and (result.max_batch_size, True) in tried
        and (result.max_batch_size + 1, False) in tried
    )


def test_a_vision_transformer_is_probed() -> None:
    """The answer is proved, and the recommendation leaves room below it."""
    result = memfit.probe("test_vit.r160_in1k", device="cpu", memory="80MiB", image_size=96)
    assert proved(result)
    assert result.options.precision is Precision.FP32
    assert result.options.image_size == (96, 96)
    assert result.source is Source.MEASURED
    assert result.capacity_bytes == 80 * MIB
    stand = result.recommended_batch_size
    assert stand is not None
    assert stand < result.max_batch_size


class Wide(nn.Module):
    """Holds two MiB for each sample at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return something of the shape (samples, 2**18) for an input of shape (samples, 1)."""
        return x.expand(-1, 2**18) * self.scale


def test_two_searches_in_a_row_give_the_same_answer() -> None:
    """The second search finds as much room as the first."""
    workload = Workload(Wide(), torch.ones(1, 1), lambda out: out.mean(), torch.optim.SGD)
    first, second = (memfit.probe(workload, device="cpu", memory="83MiB") for _ in range(2))
    assert proved(first)
    assert proved(second)
    assert first.max_batch_size == second.max_batch_size
    assert first.recommended_batch_size == second.recommended_batch_size


def test_a_batch_norm_cnn_is_probed_with_the_options_asked_for() -> None:
    """Accumulation, layout, optimizer and multiples reach the trials and the answer."""
    result = memfit.probe(
        "resnet10t",
        device="cpu",
        memory=150 * MIB,
        optimizer="momentum",
        image_size="64x48",
        num_classes=5,
        channels_last=True,
        accumulate=True,
        headroom=0.1,
        multiple_of=4,
    )
    assert proved(result)
    assert result.recommended_batch_size is not None
    assert result.recommended_batch_size % 4 == 0
    assert {trial.num_micro_batches for trial in result.trials} == {2}


class TwoTowers(nn.Module):
    """Has two inputs, one of them from a dictionary, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(1024, 1024)
        self.right = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor, *, meta: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return two scores of shape (samples, 10)."""
        folded = images.unflatten(1, (128, 1024))
        return self.left(folded).relu().mean(1)[:, :10], self.right(meta)


def two_losses(
    outputs: tuple[torch.Tensor, ...], first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    ce = nn.functional.cross_entropy
    return ce(outputs[0], first) + ce(outputs[1], second)


def test_a_model_of_two_inputs_and_two_targets_is_probed() -> None:
    """The objects are the user's, and the optimizer is given by its name."""
    inputs = {"images": torch.randn(2, 2**17), "meta": torch.randn(2, 16)}
    targets = (torch.randint(10, (2,)), torch.randint(10, (2,)))
    workload = Workload(TwoTowers(), (inputs, targets), two_losses, "sgd")
    result = memfit.probe(workload, device="cpu", memory="60MiB")
    assert proved(result)
    assert result.subject == "TwoTowers"
    assert result.options.optimizer == "sgd"


class DotProduct(nn.Module):
    """Collaborative filtering: a rating from two embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(1000, 512)
        self.items = nn.Embedding(500, 512)

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Return ratings of shape (samples,)."""
        ratings: torch.Tensor = (self.users(users) * self.items(items)).sum(1)
        return ratings


def test_an_embedding_model_is_probed_and_its_optimizer_is_as_before() -> None:
    """It has no images, and the live optimizer keeps its state."""
    model = DotProduct()
    optimizer = torch.optim.Adam(model.parameters())

    def batch(size: int) -> Any:
        users, items = torch.randint(1000, (size,)), torch.randint(500, (size,))
        return (users, items), torch.rand(size)

    workload = Workload(model, batch, nn.MSELoss(), optimizer)
    result = memfit.probe(workload, device="cpu", memory="80MiB")
    assert proved(result)
    assert result.options.optimizer is None
    assert optimizer.state == {}


def test_a_search_ends_where_it_was_told_to() -> None:
    """The ceiling is an answer, and no edge was found."""
    result = memfit.probe("resnet10t", device="cpu", memory="1GiB", image_size=32, max_batch_size=3)
    assert (result.max_batch_size, result.edge_found) == (3, False)


def test_what_does_not_fit_says_what_it_needs() -> None:
    """The message has the bytes needed and available at the smallest batch size."""
    with pytest.raises(DoesNotFitError, match=r"batch size 1: it needs \d+.* and 30.0 MiB are"):
        memfit.probe("resnet10t", device="cpu", memory="30MiB")


def test_progress_hears_of_every_trial() -> None:
    """It gets trials in the order in which they ran, the recommendation's too."""
    heard: list[Trial] = []
    result = memfit.probe(
        "resnet10t", device="cpu", memory="160MiB", image_size=64, progress=heard.append
    )
    assert tuple(heard) == result.trials
    assert Outcome.OUT_OF_MEMORY in {trial.outcome for trial in heard}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"precision": "fp8"}, "no precision 'fp8'. Choose one of fp32"),
        ({"headroom": 1.0}, "headroom"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"memory": "8GBB"}, "did you mean '8GB'"),
        ({"image_size": "big"}, "image size"),
        ({"device": "cpux"}, "not a device"),
    ],
)
def test_impossible_questions_get_a_sentence(options: dict[str, Any], says: str) -> None:
    """They are refused before anything runs."""
    with pytest.raises(UsageError, match=says):
        memfit.probe("resnet10t", **{"device": "cpu", **options})


def test_images_that_a_model_cannot_take_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the model's own words and the size that was asked for."""
    with pytest.raises(UsageError, match="inception_v3 cannot be trained on images of 16x16"):
        memfit.probe("inception_v3", device="cpu", memory="1GiB", image_size=16)


def test_a_workloads_device_and_optimizer_are_its_own(workload: Workload) -> None:
    """An option that contradicts the user's objects is refused."""
    reason = "Move the model first" if torch.cuda.is_available() else "There is no GPU for 'cuda'"
    with pytest.raises(UsageError, match=reason):
        memfit.probe(workload, device="cuda")
    with pytest.raises(UsageError, match="brings its own optimizer"):
        memfit.probe(workload, optimizer="sgd")


def snapshot(workload: Workload) -> list[Any]:
    assert isinstance(workload.optimizer, torch.optim.Optimizer)
    state = workload.optimizer.state_dict()["state"]
    return [
        *(tensor.clone() for tensor in workload.model.state_dict().values()),
        *(value.clone() for values in state.values() for value in values.values()),
        *(p.grad.clone() for p in workload.model.parameters() if p.grad is not None),
        torch.get_rng_state(),
        torch.tensor(workload.model.num_calls),
    ]


@pytest.mark.parametrize("ending", ["found", "raised", "interrupted"])
def test_a_search_leaves_the_users_objects_as_they_were(workload: Workload, ending: str) -> None:
    """This holds after out-of-memory, after an error, and after Ctrl-C."""
    before = snapshot(workload)

    def progress(trial: Trial) -> None:
        if ending == "raised":
            raise KeyError("a bug in a callback")
        if ending == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)

    try:
        result = memfit.probe(workload, device="cpu", memory="40MiB", progress=progress)
        assert ending == "found"
        assert not all(trial.fits for trial in result.trials)
    except (KeyError, KeyboardInterrupt) as error:
        assert {"raised": KeyError, "interrupted": KeyboardInterrupt}[ending] is type(error)
    assert all(torch.equal(old, new) for old, new in zip(before, snapshot(workload), strict=True))


def test_an_option_that_no_step_has_is_named() -> None:
    """A misspelt keyword is a TypeError that lists the options, and nothing runs."""
    with pytest.raises(TypeError, match=r"'chanels_last'.* channels_last, "):
        memfit.probe("test_vit", device="cpu", chanels_last=True)  # type: ignore[call-overload]
