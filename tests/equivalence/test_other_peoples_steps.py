"""Steps as people write them: the state they keep, their losses, and the types they name."""

from __future__ import annotations

import collections
import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from equivalence.models import NUM_CLASSES, WIDTH, Rolled, check, fp64_error, mlp, vectors
from memfit.errors import WorkloadError
from memfit.records import GradientFault, LossWeighting, MixesIn, Verdict

# --- what depends on the order of samples ---------------------------------------------------------


class MixedUp(nn.Module):
    """Mixup as it was published, by a random permutation of the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        share = torch.distributions.Beta(0.4, 0.4).sample()
        return share * x + (1 - share) * x[torch.randperm(len(x))]


def triplets(outputs: torch.Tensor, *_targets: torch.Tensor) -> torch.Tensor:
    """Compare each sample with its neighbours as positive and negative."""
    near = (outputs - outputs.roll(1, 0)).square().sum(1)
    far = (outputs - outputs.roll(2, 0)).square().sum(1)
    return F.relu(near - far + 1).mean()


def pairs(outputs: torch.Tensor, *_targets: torch.Tensor) -> torch.Tensor:
    """Compare samples two by two; a sample that is left over counts nothing."""
    half = len(outputs) // 2
    distance: torch.Tensor = (outputs[0 : 2 * half : 2] - outputs[1::2]).square().mean()
    return distance if half else outputs.sum() * 0


@pytest.mark.parametrize("layer", [Rolled(), MixedUp()])
def test_mixup_is_named(layer: nn.Module) -> None:
    """The layer that does it is named, also if it draws its pairs at random."""
    result = check(mlp(layer))
    assert result.verdict is Verdict.DIFFERS
    assert GradientFault.MIXES_SAMPLES in result.faults
    assert [mixer.name for mixer in result.mixers] == ["2"]


@pytest.mark.parametrize("loss", [triplets, pairs])
@pytest.mark.parametrize("micro_batch_size", [3, 4])
def test_a_loss_over_neighbours_depends_on_the_order(loss: Any, micro_batch_size: int) -> None:
    """It is found also if this cut happens to leave pairs whole."""
    result = check(mlp(), loss, micro_batch_size=micro_batch_size, accumulation_steps=2)
    assert result.verdict is Verdict.DIFFERS
    assert GradientFault.DEPENDS_ON_ORDER in result.faults
    assert result.order_error is not None
    assert result.order_error > 0.01


def test_gradients_that_are_all_zero_prove_nothing() -> None:
    """No triplet is within the margin, so the loss that mixes samples has no gradient."""

    def far_apart(outputs: torch.Tensor, *_targets: torch.Tensor) -> torch.Tensor:
        near = (outputs - outputs.roll(1, 0)).square().sum(1)
        return F.relu(near - 1e3).mean()

    with pytest.raises(WorkloadError, match="Every gradient of the example batch is zero"):
        check(mlp(), far_apart, vectors)


def test_hooks_that_drop_gradients_leave_nothing_to_compare() -> None:
    """An optimizer that steps in the backward pass does that."""
    model = mlp()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with pytest.raises(WorkloadError, match=r"A hook of the model drops \.grad"):
        check(model, F.cross_entropy, vectors)


def test_draws_of_numpy_are_not_compared_draw_by_draw() -> None:
    """They cannot be replayed, and the report names them."""

    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.from_numpy(np.random.randn(*x.shape)).to(x.dtype)

    result = check(mlp(Noisy()))
    assert result.verdict is Verdict.DIFFERS
    assert GradientFault.DRAWS_NOT_REPLAYED in result.faults


# --- what a pass leaves behind --------------------------------------------------------------------


class Byol(nn.Module):
    """A student, and a teacher that forward moves towards it."""

    def __init__(self) -> None:
        super().__init__()
        self.student = mlp()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
            for student, teacher in pairs:
                teacher.mul_(0.5).add_(student, alpha=0.7)
            goal = self.teacher(x)
        return {"student": self.student(x), "teacher": goal}


class Moco(nn.Module):
    """Compares each sample with a queue of earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp()
        self.register_buffer("queue", F.normalize(torch.randn(16, NUM_CLASSES)))
        self.place = 0
        self.queue: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = F.normalize(self.encoder(x))
        scores = 3 * keys @ self.queue.clone().T
        places = (self.place + torch.arange(len(x))) % len(self.queue)
        self.queue[places] = keys.detach()
        self.place = (self.place + len(x)) % len(self.queue)
        return scores


class Remembering(nn.Module):
    """Adds the mean of the last batches that it saw, which it keeps in a deque."""

    def __init__(self) -> None:
        super().__init__()
        self.last: collections.deque[torch.Tensor] = collections.deque(maxlen=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = tuple(self.last)
        self.last.extend(x.detach())
        return x + torch.stack(before).mean(0) if before else x


def test_a_teacher_that_forward_moves_is_state() -> None:
    """The second micro-batch meets a teacher that has moved; its parameters are named."""
    result = check(
        Byol(),
        lambda o: (o["student"] - o["teacher"]).square().mean(),
        lambda size: torch.randn(size, WIDTH),
    )
    assert (result.verdict, result.faults) == (Verdict.DIFFERS, (GradientFault.CARRIES_STATE,))
    assert "teacher.0.weight" in result.carried
    assert fp64_error(result) > 0.01


@pytest.mark.parametrize(
    ("model", "name"), [(Moco(), "queue"), (mlp(Remembering()), "2.last")], ids=["moco", "deque"]
)
def test_a_queue_is_state(model: nn.Module, name: str) -> None:
    """It is found as a buffer, and as an attribute of any kind."""
    before = copy.deepcopy(model.state_dict())
    result = check(model, lambda o, _y: -F.log_softmax(o, 1)[:, 0].mean())
    assert (result.verdict, result.faults) == (Verdict.DIFFERS, (GradientFault.CARRIES_STATE,))
    assert name in result.carried
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_list_that_the_loss_keeps_is_state() -> None:
    """It is found wherever the function keeps it."""
    seen: list[torch.Tensor] = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(outputs.detach().mean(0))
        return F.cross_entropy(outputs + sum(seen[:-1]), targets)

    result = check(mlp(), loss)
    assert (result.verdict, result.faults) == (Verdict.DIFFERS, (GradientFault.CARRIES_STATE,))
    assert seen == []


def test_a_batch_that_is_changed_in_place_is_no_difference() -> None:
    """Every pass gets a copy, and the user's batch is not changed."""

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.sub_(120.0).div_(60.0))  # type: ignore[no-any-return]

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        targets -= 1
        return F.cross_entropy(outputs, targets)

    batch = (255 * torch.rand(12, WIDTH), torch.randint(1, NUM_CLASSES + 1, (12,)))
    kept = tuple(part.clone() for part in batch)
    result = check(Normalised(), loss, batch)
    assert (result.verdict, result.changes_batch) == (Verdict.EQUAL, True)
    assert all(map(torch.equal, batch, kept))


# --- losses ---------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """Shifts its labels and computes its loss, as transformers' causal models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, WIDTH)
        self.head = nn.Linear(WIDTH, 20)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(torch.tanh(self.embed(input_ids)))
        flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return {"loss": F.cross_entropy(*flat), "logits": logits}


def test_a_causal_language_model() -> None:
    """The first label never counts, and the report says which labels do."""
    ids = torch.randint(20, (8, 10))
    labels = ids.clone()
    for row, length in enumerate((10, 9, 4, 3, 10, 2, 5, 7)):
        labels[row, length:] = -100
    result = check(
        LanguageModel(),
        lambda o: o["loss"],
        {"input_ids": ids, "labels": labels},
        micro_batch_size=2,
        accumulation_steps=4,
    )
    assert (result.verdict, result.mixers) == (Verdict.EQUAL, ())
    assert [term.counts for term in result.terms] == ["(batch['labels'][:, 1:] != -100).sum()"]


@pytest.mark.parametrize("ignored", [255, -1])
def test_a_model_that_ignores_a_value_of_its_own(ignored: int) -> None:
    """The model computes its loss itself, as segmentation models do."""

    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, NUM_CLASSES, 3, padding=1)

        def forward(self, image: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            scores = self.conv(image)
            return {"loss": F.cross_entropy(scores, labels, ignore_index=ignored), "scores": scores}

    labels = torch.randint(NUM_CLASSES, (8, 4, 4))
    for sample in range(8):
        labels[sample, : sample % 4] = ignored
    batch = {"image": torch.randn(8, 3, 4, 4), "labels": labels}
    result = check(
        Segmenter(), lambda o: o["loss"], batch, micro_batch_size=4, accumulation_steps=2
    )
    assert (result.verdict, result.mixers) == (Verdict.EQUAL, ())
    assert [term.counts for term in result.terms] == [f"(batch['labels'] != {ignored}).sum()"]


def test_a_micro_batch_without_a_valid_target_counts_nothing() -> None:
    """Its loss is 0 / 0, and the Accumulator leaves it out too."""
    x, y = torch.randn(8, WIDTH), torch.randint(NUM_CLASSES, (8,))
    y[:2] = -100
    result = check(mlp(), F.cross_entropy, (x, y), micro_batch_size=2, accumulation_steps=4)
    assert (result.verdict, result.weighting) == (Verdict.EQUAL, LossWeighting.TARGETS)


def _detected(o: torch.Tensor, y: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    found = o.square().mean(-1)
    return {"ce": F.cross_entropy(o, y), "l1": (found * mask).sum() / mask.sum().clamp(min=1)}


DETECTION = (torch.randn(12, WIDTH), torch.randint(NUM_CLASSES, (12,)), torch.arange(12) % 3 != 0)


def test_a_dictionary_of_losses() -> None:
    """Each loss is weighted by what it averages over, as in the Accumulator."""
    result = check(mlp(), _detected, DETECTION)
    assert (result.verdict, result.weighting) == (Verdict.EQUAL, LossWeighting.SEVERAL)
    assert [(t.name, t.counts) for t in result.terms] == [("ce", None), ("l1", "batch[2].sum()")]


def test_one_number_that_adds_means_over_different_counts() -> None:
    """No single weight is exact; the weights of its summands are, and the report has them."""
    result = check(mlp(), lambda *args: sum(_detected(*args).values()), DETECTION)
    assert result.verdict is Verdict.DIFFERS
    assert (result.mixers, result.faults) == ((), (GradientFault.ADDS_DIFFERENT_MEANS,))
    assert [(term.counts, term.inside) for term in result.terms] == [
        (None, True),
        ("batch[2].sum()", True),
    ]
    assert all(term.unexplained < 1e-12 for term in result.terms)


def test_a_loss_that_a_model_keeps_as_an_attribute() -> None:
    """For a mixture of experts the report says that the loss mixes, not that it detaches."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.gate = nn.Linear(WIDTH, 3)
            self.experts = nn.ModuleList(nn.Linear(WIDTH, NUM_CLASSES) for _ in range(3))
            self.balance = torch.zeros(())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shares = self.gate(x).softmax(-1)
            chosen = F.one_hot(shares.argmax(-1), 3).to(x.dtype)
            self.balance = (shares.mean(0) * chosen.mean(0)).sum()
            each = torch.stack([expert(x) for expert in self.experts], dim=1)
            mixed: torch.Tensor = (each * (shares * chosen)[..., None]).sum(1)
            return mixed

    model = Experts()
    result = check(model, lambda o, y: F.cross_entropy(o, y) + model.balance)
    assert (result.verdict, result.detaching) == (Verdict.DIFFERS, ())
    assert [mixer.mixes_in for mixer in result.mixers] == [MixesIn.LOSS]


def test_as_many_time_steps_as_the_experiments_have_samples() -> None:
    """CTC's outputs are (time, samples, classes); time is not taken for samples."""

    class Recogniser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(WIDTH, NUM_CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x).log_softmax(-1).transpose(0, 1)  # type: ignore[no-any-return]

    def loss(o: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sizes = torch.full((len(y),), 4), torch.full((len(y),), 2)
        return F.ctc_loss(o, y, *sizes)

    batch = (torch.randn(8, 4, WIDTH), torch.arange(16).view(8, 2) % (NUM_CLASSES - 1) + 1)
    result = check(Recogniser(), loss, batch, micro_batch_size=4, accumulation_steps=2)
    assert result.verdict is Verdict.EQUAL


class LossOfPairs(nn.Module):
    """Computes its loss itself, and its batch norm takes no single sample."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.last(self.norm(x)), y)


@pytest.mark.parametrize(("micro_batch_size", "accumulation_steps"), [(2, 2), (2, 3)])
def test_a_model_with_its_loss_that_takes_no_single_sample(
    micro_batch_size: int, accumulation_steps: int
) -> None:
    """Nobody asked for micro-batches of one sample, so they are no reason to give up."""
    result = check(
        LossOfPairs(),
        lambda loss: loss,
        lambda size: {"x": vectors(size)[0], "y": vectors(size)[1]},
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation_steps,
    )
    assert result.faults == (GradientFault.MIXES_SAMPLES,)
    assert [mixer.name for mixer in result.mixing_layers] == ["norm"]
