"""torchvision's own detectors, with a tiny backbone: lists of images and boxes, losses inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection import anchor_utils as anchors

import memfit
from memfit.records import Verdict


class Backbone(nn.Sequential):
    """Two convolutions, and their channels, as torchvision wants to know them."""

    def __init__(self, out_channels: Any) -> None:
        super().__init__(nn.Conv2d(3, 4, 3, 8, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 4, 1))
        self.out_channels = out_channels


def single_shot() -> nn.Module:
    boxes = anchors.DefaultBoxGenerator([[2]])
    model: nn.Module = detection.ssd.SSD(Backbone([8]), boxes, (96, 96), 4)
    return model


def focal() -> nn.Module:
    boxes = anchors.AnchorGenerator(sizes=((16, 32),), aspect_ratios=((0.5, 1.0),))
    model: nn.Module = detection.RetinaNet(
        Backbone(8), 4, anchor_generator=boxes, min_size=96, max_size=128
    )
    return model


def scenes(batch_size: int) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Return images, and one or two boxes for each of them."""
    generator = torch.Generator().manual_seed(3)
    images, targets = [], []
    for index in range(batch_size):
        corner = torch.rand(1 + index % 2, 2, generator=generator) * 40
        size = 20 + torch.rand(corner.shape, generator=generator) * 30
        images.append(torch.rand(3, 96, 128, generator=generator))
        labels = torch.randint(1, 4, (len(corner),), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + size], 1), "labels": labels})
    return images, targets


@pytest.mark.parametrize(
    ("make", "counts"),
    [(single_shot, "sum(len(one) for one in batch[1][...]['boxes'])"), (focal, None)],
)
def test_the_weights_of_a_detector_are_found(make: Any, counts: str | None) -> None:
    """One divides by the boxes of the batch, and the other by its images."""
    torch.manual_seed(0)
    workload = memfit.Workload(
        make(), scenes, lambda losses: sum(losses.values()), "sgd", num_inputs=2
    )
    result = memfit.verify(
        workload, micro_batch_size=2, accumulation_steps=2, device="cpu", progress=None
    )
    assert result.verdict is Verdict.EQUAL
    assert [term.counts for term in result.terms] == [counts]
