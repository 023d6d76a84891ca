"""Training steps that are made from names and from a user's own objects."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from memfit import Workload
from memfit.errors import UnknownModelError, UnsupportedError, UsageError, WorkloadError
from memfit.records import Precision, StepOptions
from memfit.step.runner import PreparedStep
from memfit.step.training_step import TrainingStep

CPU = torch.device("cpu")
FP32 = StepOptions(precision=Precision.FP32)


def prepared(subject: str | Workload, **options: Any) -> PreparedStep:
    step = TrainingStep(
        subject=subject, options=StepOptions(**{"precision": Precision.FP32, **options})
    )
    made = step.prepare(CPU)
    made.begin()
    return made


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": Precision.AMP_BF16},
        {"precision": Precision.AMP_FP16},
        {"precision": Precision.BF16},
        {"accumulate": True, "optimizer": "momentum"},
        {"grad_checkpointing": True, "image_size": (96, 64), "num_classes": 7},
        {"channels_last": True, "model_kwargs": (("in_chans", 1),)},
    ],
    ids=str,
)
def test_timm_models_train_in_every_way(options: dict[str, Any]) -> None:
    """Each option makes a step that runs and moves the weights."""
    made = prepared("test_vit.r160_in1k", **options)
    weights = [parameter.detach().clone() for parameter in made.model.parameters()]
    made.iterate(2)
    made.iterate(2)
    moved = [
        not torch.equal(old, new) for old, new in zip(weights, made.model.parameters(), strict=True)
    ]
    assert any(moved)
    assert made.optimizer_state_bytes > 0
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_a_workload_is_printed_in_a_line() -> None:
    """Its parts are named. The model and the batch in full would fill pages."""
    batch = (torch.zeros(3, 4), torch.zeros(3, 2))
    shown = repr(Workload(nn.Linear(4, 2), batch, nn.MSELoss(), torch.optim.AdamW))
    assert shown == "Workload(Linear, batch of 3, loss=MSELoss, optimizer=AdamW)"
    shown = repr(Workload(nn.Linear(4, 2), lambda _: batch, nn.functional.mse_loss, "sgd"))
    assert shown == "Workload(Linear, batch=a function, loss=mse_loss, optimizer=sgd)"


def test_options_reach_the_model() -> None:
    """The model has the precision, layout, classes and checkpointing that were asked for."""
    made = prepared("resnet10t", channels_last=True, num_classes=7, grad_checkpointing=True)
    weight = made.model.get_submodule("layer1.0.conv1").weight
    assert isinstance(weight, torch.Tensor)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert made.model.num_classes == 7
    assert vars(made.model)["grad_checkpointing"] is True
    half = prepared("resnet10t", precision=Precision.BF16)
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


def test_the_optimizer_has_its_state_after_one_step_also_when_the_scaler_skips_it() -> None:
    """An overflow in fp16 must not hide the optimizer's state from the peak."""

    def overflowing(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets) * float("inf")

    model = nn.Linear(4, 3)
    batch = (torch.randn(2, 4), torch.tensor([0, 1]))
    workload = Workload(model, batch, overflowing, torch.optim.Adam)
    made = prepared(workload, precision=Precision.AMP_FP16)
    made.iterate(2)
    assert made.optimizer_state_bytes > 0


def test_accumulated_micro_batches_weigh_like_one_batch() -> None:
    """Two micro-batches of the same samples give the gradient of one batch."""
    seen: list[torch.Tensor] = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            seen.append(self.param_groups[0]["params"][0].grad.clone())

    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    batch = (torch.randn(2, 4), torch.tensor([0, 1]))
    workload = Workload(model, batch, nn.functional.cross_entropy, Recorder)
    prepared(workload).iterate(2)
    prepared(workload, accumulate=True).iterate(2)
    assert torch.allclose(seen[0], seen[1])


class TwoInputs(nn.Module):
    """A model with two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return two scores of shape (samples, 3)."""
        return self.linear(left), self.linear(right)


def two_losses(
    outputs: tuple[torch.Tensor, torch.Tensor], first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs[0], first) + nn.functional.cross_entropy(
        outputs[1], second
    )


x, y = torch.randn(2, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("batch", "num_inputs"),
    [
        (((x, x), (y, y)), 1),
        ([[x, x], [y, y]], 1),
        (({"left": x, "right": x}, (y, y)), 1),
        ((x, x, y, y), 2),
        (((x, x), y, y), 1),
        (lambda n: ((torch.randn(n, 4), torch.randn(n, 4)), (y.repeat(n)[:n], y.repeat(n)[:n])), 1),
    ],
    ids=["nested", "lists", "keywords", "flat", "flat targets", "function"],
)
def test_batches_of_any_nesting_train(batch: Any, num_inputs: int) -> None:
    """They have several inputs and targets in many forms, at any size."""
    workload = Workload(TwoInputs(), batch, two_losses, torch.optim.SGD, num_inputs=num_inputs)
    made = prepared(workload)
    made.iterate(1)
    made.iterate(5)


class Whole(nn.Module):
    """Takes one argument: a list of crops, a dictionary or a packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, given: Any) -> Any:
        """Return scores of shape (samples, 3)."""
        if isinstance(given, PackedSequence):
            padded, lengths = nn.utils.rnn.pad_packed_sequence(given, batch_first=True)
            return self.linear(padded.sum(1) / lengths[:, None])
        parts = given.values() if isinstance(given, dict) else given
        return torch.stack([self.linear(part) for part in parts]).mean(0)


@pytest.mark.parametrize(
    "inputs",
    [[x, x, x], {"left": x, "right": x}, nn.utils.rnn.pack_sequence([x, x[:1]])],
    ids=["list", "dictionary", "packed"],
)
def test_a_model_that_takes_one_argument_gets_the_whole(inputs: Any) -> None:
    """A list of crops, a dictionary and a packed sequence are not spread over arguments."""
    workload = Workload(Whole(), (inputs, y), nn.functional.cross_entropy, "sgd")
    prepared(workload).iterate(2)


def test_a_state_of_another_batch_size_is_named() -> None:
    """A recurrent model that keeps its last hidden state cannot take a batch of another size."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(4, 3, batch_first=True)
            self.kept: tuple[torch.Tensor, ...] | None = None

        def forward(self, x: torch.Tensor) -> Any:
            out, kept = self.rnn(x[:, None], self.kept)
            self.kept = tuple(state.detach() for state in kept)
            return out[:, 0]

    made = prepared(Workload(Keeping(), (x, y), nn.functional.cross_entropy, "sgd"))
    made.iterate(2)
    with pytest.raises(WorkloadError, match=r"Keeping keeps 'kept' .* \(1, 2, 3\).* has 3 samples"):
        made.iterate(3)


def test_a_batch_without_targets_trains() -> None:
    """A model that returns its own loss takes a dictionary and needs no targets."""

    class OwnLoss(nn.Linear):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return nn.functional.cross_entropy(super().forward(x), y)

    workload = Workload(OwnLoss(4, 3), {"x": x, "y": y}, lambda loss: loss, "sgd")
    prepared(workload).iterate(3)


class Listed(nn.Module):
    """Takes a list of images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Return scores of shape (samples, 2)."""
        assert isinstance(images, list)
        return torch.stack([self.conv(image).mean((1, 2)) for image in images])


def test_a_function_may_return_what_no_slice_cuts() -> None:
    """These are graphs, a mask for all samples, and as many images as channels."""

    class Graphs(nn.Linear):
        def forward(self, x: torch.Tensor, graph: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            assert mask.shape == (6, 6)
            sums = torch.zeros(int(graph.max()) + 1, self.out_features)
            return sums.index_add(0, graph, super().forward(x))

    def graphs(size: int) -> Any:
        nodes = torch.arange(size).repeat_interleave(5)
        inputs = {"x": torch.randn(5 * size, 4), "graph": nodes, "mask": torch.zeros(6, 6)}
        return inputs, torch.zeros(size, dtype=torch.long)

    made = prepared(Workload(Graphs(4, 3), graphs, nn.functional.cross_entropy, "sgd"))
    for size in (1, 5, 6):
        made.iterate(size)

    def images(size: int) -> Any:
        return [torch.randn(3, 8, 8)] * size, torch.zeros(size, dtype=torch.long)

    made = prepared(Workload(Listed(), images, nn.functional.cross_entropy, "sgd"))
    for size in (1, 3, 4):
        made.iterate(size)


def test_an_example_of_lists_makes_batches_of_any_size() -> None:
    """The lists have one entry for each sample; entries are repeated."""
    images = [torch.randn(3, 8, 8 + index) for index in range(4)]
    workload = Workload(
        Listed(), (images, torch.zeros(4, dtype=torch.long)), nn.functional.cross_entropy, "sgd"
    )
    made, labels = workload.batch_of(6)
    assert [image.shape[2] for image in made] == [8, 9, 10, 11, 8, 9]
    assert len(labels) == 6
    prepared(workload).iterate(6)


def test_several_losses_are_added() -> None:
    """The `Accumulator` adds them too."""

    def losses(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"ce": nn.functional.cross_entropy(outputs, targets), "l2": outputs.square().mean()}

    prepared(good(loss=losses)).iterate(2)
    with pytest.raises(WorkloadError, match="not str"):
        prepared(good(loss=lambda *_: {"name": "ce"})).iterate(2)


def good(**changes: Any) -> Workload:
    parts: dict[str, Any] = {
        "model": nn.Linear(4, 3),
        "batch": (x, y),
        "loss": nn.functional.cross_entropy,
        "optimizer": torch.optim.SGD,
    }
    return Workload(**{**parts, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "resnet18"}, "must be an nn.Module, not str"),
        ({"model": nn.ReLU()}, "nothing to train"),
        ({"model": nn.Linear(4, 3).eval()}, "evaluation mode"),
        ({"loss": 3}, "must be a function of the outputs and targets, .* not int"),
        ({"optimizer": 3}, "must be a torch.optim.Optimizer"),
        ({"optimizer": torch.optim.SGD(nn.Linear(4, 3).parameters())}, "no parameter of the model"),
        ({"batch": (x, torch.zeros(3))}, "leading dimensions differ"),
        ({"num_inputs": 0}, "num_inputs"),
    ],
)
def test_impossible_workloads_are_refused_at_once(changes: dict[str, Any], says: str) -> None:
    """The mistake is reported when the workload is made, not in a trial."""
    with pytest.raises(WorkloadError, match=says):
        good(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, r"the shape \(2,\)"),
        ({"loss": lambda outputs, targets: 1.0}, "not float"),
        ({"loss": lambda outputs, targets: targets.sum().float()}, "has no gradient"),
        ({"batch": lambda n: (x, y)}, "returned 2 samples when asked for 3"),
        ({"batch": lambda n: ({"a": x, "b": x[:1]}, y)}, "no part grows with the batch size"),
        ({"optimizer": lambda parameters: "sgd"}, "returned str"),
    ],
)
def test_impossible_steps_are_named_when_they_run(changes: dict[str, Any], says: str) -> None:
    """Some mistakes show only when the step runs, and get their sentence then."""
    with pytest.raises(WorkloadError, match=says):
        prepared(good(**changes)).iterate(3 if "batch" in changes else 2)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet5O", "did you mean resnet50"),
        ("qqqqqq", r"no model 'qqqqqq'\."),
        ("test_vit.r160_in2k", "did you mean r160_in1k"),
        ("resnet50.zzzzzzzz", "it has "),
        ("hf-hub:timm/resnet50", "downloads nothing"),
    ],
)
def test_unknown_models_get_the_nearest_names(name: str, says: str) -> None:
    """The message has the name that was given and the most similar names."""
    with pytest.raises(UnknownModelError, match=says):
        TrainingStep(subject=name, options=FP32)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("resnet10t", {"optimizer": "adamm"}, "did you mean adam"),
        ("resnet10t", {"model_kwargs": (("foo", 1),)}, "cannot build resnet10t with foo=1"),
        ("resnet10t", {"model_kwargs": (("drop_pth_rate", 1),)}, "did you mean drop_path_rate?"),
        ("vit_tiny_patch16_224", {"image_size": (225, 224)}, "the nearest is 224 or 240"),
        ("vit_tiny_patch16_224", {"image_size": (224, 9)}, "the nearest is 16"),
        ("vit_small_patch14_dinov2", {}, "Give num_classes"),
        ("inception_v3", {"grad_checkpointing": True}, "no gradient checkpointing"),
    ],
)
def test_impossible_timm_options_get_a_sentence(
    name: str, options: dict[str, Any], says: str
) -> None:
    """The message has the value and the nearest valid one."""
    with pytest.raises(UsageError, match=says):
        prepared(name, **options)


def test_options_of_timm_models_do_not_pass_silently_for_a_workload() -> None:
    """An option that would do nothing is refused."""
    with pytest.raises(UsageError, match="num_classes is for timm models"):
        TrainingStep(subject=good(), options=StepOptions(num_classes=3))


def test_a_workload_without_checkpointing_says_so() -> None:
    """Checkpointing needs a switch of the model."""
    with pytest.raises(UsageError, match="no gradient checkpointing"):
        prepared(good(), grad_checkpointing=True)


def test_a_step_needs_a_chosen_precision() -> None:
    """Only the device can say what AUTO means."""
    with pytest.raises(ValueError, match="precision"):
        TrainingStep(subject=good(), options=StepOptions()).prepare(CPU)


def test_what_a_step_raises_is_marked_as_its_own() -> None:
    """By this mark the command line tells a model's error from a bug."""

    def broken(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        raise KeyError("typo")

    with pytest.raises(KeyError) as caught:
        prepared(good(loss=broken)).iterate(2)
    assert caught.value.raised_in_step is True  # type: ignore[attr-defined]


def test_a_torchvision_of_another_torch_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message for this mismatch, which breaks `import timm`, says what to do."""

    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "timm":
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(UnsupportedError, match="pip install --upgrade torch torchvision"):
        TrainingStep(subject="resnet10t", options=FP32)


def test_zero_gradients_leave_nothing_behind() -> None:
    """Later gradients are right, even if the optimizer refuses zeros."""
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters())
    workload = Workload(embedding, torch.tensor([1, 2]), lambda out: out.sum(), optimizer)
    step = TrainingStep(subject=workload, options=StepOptions(precision=Precision.FP32))
    prepared = step.prepare(torch.device("cpu"))
    prepared.begin()
    with contextlib.suppress(RuntimeError):
        prepared.step_on_zeros()
    assert embedding.weight.grad is None
    prepared.iterate(2)
    assert optimizer.state[embedding.weight]["step"] == 1
