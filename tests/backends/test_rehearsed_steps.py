"""A rehearsed step and a simulated one take the same bytes: a sample of the benchmark's table.

`benchmarks/against_rehearsal.py` compares more families and settings, operator by operator.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pinned import IS_PINNED
from torch import nn

from memfit.api.cards import Cards
from memfit.api.steps import describe
from memfit.backends import with_precision
from memfit.backends.simulated import SimulatedBackend
from memfit.records import Engine, Outcome
from memfit.simulation.cudnn.plans import missing_cudnn
from memfit.step.training_step import TrainingStep
from memfit.step.workload import Workload

pytestmark = [
    pytest.mark.rehearses,
    pytest.mark.skipif(
        missing_cudnn() is not None, reason=f"cuDNN cannot be asked: {missing_cudnn()}"
    ),
]

_STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("regnetx_002", {"precision": "amp-fp16", "channels_last": True, "optimizer": "momentum"}),
    ("efficientvit_b0", {"precision": "amp-bf16", "optimizer": "adamw"}),
    ("test_resnet", {"precision": "fp32", "optimizer": "momentum"}),
    ("fasternet_t0", {"precision": "amp-bf16", "optimizer": "adamw"}),
    ("resnet10t", {"precision": "amp-bf16", "channels_last": True, "optimizer": "adamw"}),
    ("sequencer2d_s", {"precision": "amp-bf16", "optimizer": "adamw"}),
    ("convnextv2_atto", {"precision": "amp-bf16", "optimizer": "adamw"}),
    ("test_nfnet", {"precision": "amp-fp16", "optimizer": "adamw"}),
    ("resnet18", {"precision": "amp-fp16", "optimizer": "momentum", "image_size": 224}),
    ("resnet18", {"precision": "amp-fp16", "evaluate": True}),
    # A trial begins without what was left in the cache by the move to channels-last.
    ("xception41p", {"precision": "fp32", "channels_last": True, "optimizer": "momentum"}),
    # Its weights are moved and converted in one go.
    ("rexnet_100", {"precision": "bf16", "channels_last": True, "optimizer": "momentum"}),
    # It unfolds and folds, and its gradients have other layouts than what kernels read.
    ("volo_d1_224", {"precision": "fp32", "optimizer": "adamw", "image_size": 224}),
    # Its tables of biases are made in the first forward pass.
    ("levit_128s", {"precision": "amp-fp16", "evaluate": True, "image_size": 224}),
)

# With `cudnn.benchmark`, plans are tried for depthwise convolutions that cuDNN computes, too.
_TRYING_STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mobilenetv3_small_050", {"precision": "amp-fp16", "optimizer": "momentum"}),
    ("mobilenetv3_small_050", {"precision": "amp-bf16", "channels_last": True, "evaluate": True}),
    ("test_mambaout", {"precision": "amp-fp16", "channels_last": True, "optimizer": "adamw"}),
)


def tried(step: TrainingStep, batch_size: int, *sides: Cards) -> list[Any]:
    """Return a trial of a step by each side, on an RTX 3090."""
    trials = []
    for cards in sides:
        with cards.open("rtx3090", None, step) as card:
            trials.append(card.trial(with_precision(step, card), batch_size))
    return trials


# One process rehearses all of them, because each start takes seconds.
def test_steps_take_the_same_bytes() -> None:
    """What tensors ask for is the same to a block, and what is reserved is the same."""
    with Cards(Engine.REHEARSE) as rehearsed, Cards(Engine.SIMULATE) as simulated:
        for model, options in _STEPS:
            step = describe(model, **{"image_size": 64, **options})
            real, guessed = tried(step, 8, rehearsed, simulated)
            assert guessed.peak_requested_bytes == pytest.approx(
                real.peak_requested_bytes, rel=1e-3 if IS_PINNED else 0.03
            ), model
            assert guessed.peak_allocated_bytes == pytest.approx(
                real.peak_allocated_bytes, rel=1e-5 if IS_PINNED else 1e-2
            ), model
            assert guessed.peak_reserved_bytes == pytest.approx(
                real.peak_reserved_bytes, rel=1e-3 if IS_PINNED else 0.03
            ), model


def test_a_model_that_fits_in_bf16_only_fits() -> None:
    """It is never on the card in fp32: 350 MB of weights on a card that has room for 300."""
    step = describe("vit_base_patch32_224", precision="bf16", evaluate=True)
    with Cards(Engine.REHEARSE) as rehearsed:
        with rehearsed.open("rtx3090", 2**30, step) as card:
            room = card.capacity().usable_bytes
        memory_bytes = 2**30 - room + 300 * 10**6
        with rehearsed.open("rtx3090", memory_bytes, step) as card:
            trial = card.trial(with_precision(step, card), 1)
    assert trial.outcome is Outcome.FITS


def test_plans_are_tried_for_all_of_cudnns_convolutions() -> None:
    """So the peak is that of the largest plan, where activations are few."""
    with (
        torch.backends.cudnn.flags(enabled=True, benchmark=True),
        Cards(Engine.REHEARSE) as rehearsed,
        Cards(Engine.SIMULATE) as simulated,
    ):
        for model, options in _TRYING_STEPS:
            step = describe(model, image_size=64, **options)
            real, guessed = tried(step, 64, rehearsed, simulated)
            assert guessed.peak_requested_bytes == real.peak_requested_bytes, (model, options)
            assert guessed.peak_reserved_bytes == real.peak_reserved_bytes, (model, options)


class Normed(nn.Module):
    """Blocks with RMSNorm, as language models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(96) for _ in range(4))
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(4))
        self.head = nn.Linear(96, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return scores for each token."""
        for norm, layer in zip(self.norms, self.layers, strict=True):
            tokens = tokens + layer(norm(tokens))
        scores: torch.Tensor = self.head(tokens)
        return scores


def test_rms_norm_is_one_kernel() -> None:
    """It is so where torch has the kernel; autocast decides that by the release."""
    batch = (torch.zeros(4, 50, 96), torch.zeros(4, dtype=torch.long))
    workload = Workload(Normed(), batch, of_first_step, "adamw")
    with Cards(Engine.REHEARSE) as rehearsed, Cards(Engine.SIMULATE) as simulated:
        for precision in ("fp32", "amp-bf16", "bf16"):
            step = describe(workload, precision=precision)
            real, guessed = tried(step, 256, rehearsed, simulated)
            assert guessed.peak_requested_bytes == real.peak_requested_bytes, precision
            assert guessed.peak_reserved_bytes == real.peak_reserved_bytes, precision


def test_the_edge_is_the_rehearsed_edge() -> None:
    """Near the edge, where retries decide, both fit and fail at the same batch sizes.

    With another torch than the pinned one, the edge may be a sample away.
    """
    slack = 0 if IS_PINNED else 1
    step = describe("test_resnet", image_size=64, precision="amp-bf16", optimizer="adamw")
    with Cards(Engine.REHEARSE) as rehearsed, Cards(Engine.SIMULATE) as simulated:
        with simulated.open("rtx3090", 2**30, step) as card:
            assert isinstance(card, SimulatedBackend)
            chosen = with_precision(step, card)
            edge = card.expected_edge(chosen)
            assert edge is not None
            sizes = (edge - slack, edge + 1 + slack)
            guessed = [card.trial(chosen, size) for size in sizes]
        with rehearsed.open("rtx3090", 2**30, step) as card:
            real = [card.trial(with_precision(step, card), size) for size in sizes]
    assert [trial.outcome for trial in guessed] == [trial.outcome for trial in real]
    assert bool(guessed[0].num_alloc_retries) == bool(real[0].num_alloc_retries)
    if IS_PINNED:
        assert guessed[0].num_alloc_retries == real[0].num_alloc_retries
        assert guessed[0].peak_reserved_bytes == real[0].peak_reserved_bytes


class Tagger(nn.Module):
    """A recurrent layer between two linear ones."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        width = 48 * (2 if options.get("bidirectional") else 1)
        self.embed = nn.Linear(24, 64)
        self.layer = kind(64, 48, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(width, 10)

    def forward(self, sequences: torch.Tensor) -> torch.Tensor:
        """Return scores for each step."""
        outputs, _ = self.layer(self.embed(sequences))
        scores: torch.Tensor = self.head(outputs)
        return scores


def of_first_step(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss, of one step of each sequence."""
    return nn.functional.cross_entropy(scores[:, 0], labels)


_TAGGERS: tuple[tuple[type[nn.RNNBase], dict[str, Any], str], ...] = (
    (nn.LSTM, {"batch_first": True, "bidirectional": True}, "amp-bf16"),
    (nn.LSTM, {"batch_first": True, "num_layers": 2}, "fp32"),
    (nn.GRU, {"batch_first": True}, "amp-bf16"),
    (nn.GRU, {"bidirectional": True}, "amp-bf16"),
    (nn.LSTM, {"batch_first": True}, "bf16"),
)


# Before, torch runs recurrent layers in bf16 step by step, without cuDNN.
_TAKES_BF16 = 91300


def test_recurrent_layers_take_the_same_bytes() -> None:
    """Casts, copies with the steps first, the reserve, the workspace and the weights' gradients."""
    with Cards(Engine.REHEARSE) as rehearsed, Cards(Engine.SIMULATE) as simulated:
        for kind, options, precision in _TAGGERS:
            if "bf16" in precision and (torch.backends.cudnn.version() or 0) < _TAKES_BF16:
                continue
            batch = (torch.zeros(4, 12, 24), torch.zeros(4, dtype=torch.long))
            workload = Workload(Tagger(kind, **options), batch, of_first_step, "adamw")
            step = describe(workload, precision=precision)
            real, guessed = tried(step, 512, rehearsed, simulated)
            said = kind, options, precision
            assert guessed.peak_requested_bytes == real.peak_requested_bytes, said
            assert guessed.peak_allocated_bytes == real.peak_allocated_bytes, said
