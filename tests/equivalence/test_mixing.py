"""Tests of memfit.equivalence.mixing."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from equivalence.models import WIDTH, HandWrittenNorm, MixingInBackward, Sorting, mlp
from memfit.equivalence.backward_mixing import mixing_gradients
from memfit.equivalence.mixing import NUM_SAMPLES, mixing_layers
from memfit.equivalence.samples import Samples
from memfit.records import MixesIn
from memfit.step.batches import Layout


def samples_of(*shape: int) -> Samples:
    """Return random inputs with this shape per sample."""
    torch.manual_seed(0)
    inputs = torch.randn(NUM_SAMPLES, *shape, dtype=torch.float64)
    layout = Layout.of(inputs, num_samples=NUM_SAMPLES)
    return Samples(batch=inputs, layout=layout, split=lambda batch: (batch, ()))


def mixers_of(model: nn.Module, *shape: int) -> list[str]:
    """Return the names of the layers that mix, for random inputs with this shape per sample."""
    return [mixer.name for mixer in mixing_layers(model.double(), samples_of(*shape))]


class HeadsFirst(nn.Module):
    """Puts heads before samples, (heads x samples, width), and mixes no samples."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH // 2, WIDTH // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = x.view(len(x), 2, -1).transpose(0, 1).reshape(2 * len(x), -1)
        out = self.inner(heads).view(2, len(x), -1)
        back: torch.Tensor = out.transpose(0, 1).reshape(len(x), -1)
        return back


class NormedAndActive(nn.BatchNorm1d):
    """Batch normalisation with an activation in it, as timm has it."""

    def __init__(self) -> None:
        super().__init__(WIDTH)
        self.act = nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(x))  # type: ignore[no-any-return]


def test_layers_are_named_in_the_order_of_first_appearance() -> None:
    """This holds too if one of them passes mixed values to a layer inside it."""
    model = nn.Sequential(NormedAndActive(), nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    assert mixers_of(model, WIDTH) == ["0", "2"]


class Centred(nn.Module):
    """Mixes samples between its layers, so that no name of a layer shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.after = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        return self.after(x - x.mean(dim=0))  # type: ignore[no-any-return]


class Balanced(nn.Module):
    """Weighs each sample by its share of the batch, as expert routing does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.softmax(x.sum(dim=1), dim=0)[:, None]


MIXING: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm1d,
    "sync": nn.SyncBatchNorm,
    "hand": HandWrittenNorm,
}
PLAIN: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "linear": lambda width: nn.Linear(width, width),
}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([*MIXING, *PLAIN]), min_size=1, max_size=5))
def test_exactly_the_layers_that_mix_are_named(kinds: list[str]) -> None:
    """They are named in their order, whatever comes before and after them."""
    layers = [(MIXING | PLAIN)[kind](WIDTH) for kind in kinds]
    expected = [str(index) for index, kind in enumerate(kinds) if kind in MIXING]
    assert mixers_of(nn.Sequential(*layers), WIDTH) == expected


def test_mixing_between_layers_is_the_container_s() -> None:
    """The layer that gets mixed values as inputs is not named."""
    assert mixers_of(nn.Sequential(nn.Linear(WIDTH, WIDTH), Centred()), WIDTH) == ["1"]


def test_a_layer_that_nobody_thought_of() -> None:
    """A softmax over the batch is found."""
    assert mixers_of(mlp(Balanced()), WIDTH) == ["2"]


def test_another_layout_is_no_mixing() -> None:
    """Outputs with heads before samples are not taken for mixing."""
    assert mixers_of(mlp(HeadsFirst()), WIDTH) == []


def test_norms_within_a_sample_do_not_mix() -> None:
    """Group norm, instance norm and weight normalisation are not named."""
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
        nn.GroupNorm(2, 8),
        nn.InstanceNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    assert mixers_of(model, 3, 8, 8) == []


def test_timm_s_fused_batch_norm_is_named_itself() -> None:
    """The dropout and the activation inside it see its result first, and are not named."""
    model = timm.create_model("test_efficientnet", num_classes=7).train()
    named = mixers_of(model, 3, 64, 64)
    assert named[0] == "bn1"
    assert all(isinstance(model.get_submodule(name), nn.BatchNorm2d) for name in named)
    assert len(named) == sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


def test_mixing_in_backward_alone() -> None:
    """The outputs are right, but the gradient is not."""
    model = mlp(MixingInBackward()).double()
    samples = samples_of(WIDTH)
    assert mixing_layers(model, samples) == ()
    (mixer,) = mixing_gradients(model, samples)
    assert (mixer.name, mixer.mixes_in) == ("2", MixesIn.BACKWARD)


def test_a_layer_that_sorts_samples_and_puts_them_back_mixes_nothing() -> None:
    """Its inner layers get other rows, and its outputs do not mix."""
    assert mixers_of(nn.Sequential(nn.Linear(WIDTH, WIDTH), Sorting()), WIDTH) == []
    mixing = nn.Sequential(Sorting(), nn.BatchNorm1d(WIDTH), Sorting())
    assert mixers_of(mixing, WIDTH) == ["1"]


class _StepsInside(nn.Module):
    """Takes a step down the gradient of its own weights in forward, as meta-learning does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        error = self.inner(x).square().mean()
        (slope,) = torch.autograd.grad(error, self.inner.weight, create_graph=True)
        return nn.functional.linear(x, self.inner.weight - 0.1 * slope)


def test_a_model_that_differentiates_by_its_own_weights() -> None:
    """The search needs their gradients, and finds that a step on the batch mixes samples."""
    assert mixers_of(nn.Sequential(nn.Linear(WIDTH, WIDTH), _StepsInside()), WIDTH) == ["1"]


class _Listed(nn.Module):
    """Takes a list of samples, as detectors do, and normalises over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, *samples: torch.Tensor) -> torch.Tensor:
        each = [self.first(one[None]) for one in samples]
        result: torch.Tensor = self.norm(torch.cat(each))
        return result


class _Detector(nn.Module):
    """Passes its list of samples on to another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Listed()

    def forward(self, samples: list[torch.Tensor]) -> torch.Tensor:
        result: torch.Tensor = self.inner(*samples)
        return result


def test_a_layer_that_mixes_samples_of_a_list() -> None:
    """Single samples are passed on as they are, so that the batch norm behind them is named."""
    batch = (list(samples_of(WIDTH).batch), torch.arange(NUM_SAMPLES))
    layout = Layout.of(batch, num_samples=NUM_SAMPLES)
    samples = Samples(batch=batch, layout=layout, split=lambda batch: ((batch[0],), ()))
    found = mixing_layers(_Detector().double(), samples)
    assert [mixer.name for mixer in found] == ["inner.norm"]
