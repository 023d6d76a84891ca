"""Batches of any nesting are resized along their first dimension."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memfit.errors import WorkloadError
from memfit.step.batches import batch_size_of, resized, to_device


@given(st.integers(1, 9), st.integers(1, 30))
def test_resizing_repeats_the_samples_in_order(size: int, wanted: int) -> None:
    """All tensors get the same rows; everything else does not change."""
    rows = torch.arange(size)
    batch: OrderedDict[str, Any] = OrderedDict(
        a=[rows, (rows * 2, "text")], b={"scale": torch.tensor(3.0)}, c=None
    )
    made = resized(batch, wanted)
    expected = torch.arange(wanted) % size
    assert isinstance(made, OrderedDict)
    assert batch_size_of(made) == wanted
    assert torch.equal(made["a"][0], expected)
    assert torch.equal(made["a"][1][0], expected * 2)
    assert made["a"][1][1] == "text"
    assert torch.equal(made["b"]["scale"], batch["b"]["scale"])
    assert made["c"] is None


def test_a_resized_batch_shares_nothing_with_the_example() -> None:
    """A step that changes its inputs in place must not change the user's batch."""
    rows = torch.zeros(4, 2)
    resized(rows, 3).add_(1)
    resized(rows, 4).add_(1)
    assert rows.sum() == 0


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ("text", "no tensor with a leading dimension"),
        (torch.tensor(1.0), "no tensor with a leading dimension"),
        (torch.zeros(0, 3), "empty"),
        ({"x": torch.zeros(2), "y": torch.zeros(3)}, r"batch\['x'\] has 2 and batch\['y'\] has 3"),
    ],
)
def test_what_has_no_batch_size_gets_a_sentence(batch: object, says: str) -> None:
    """The message says which tensors disagree."""
    with pytest.raises(WorkloadError, match=says):
        batch_size_of(batch)


def test_placing_converts_floating_point_only() -> None:
    """Classes stay integers; images take the type and the layout."""
    images, classes = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long)
    placed = to_device(
        (images, classes, 7),
        torch.device("cpu"),
        dtype=torch.bfloat16,
        memory_format=torch.channels_last,
    )
    assert placed[0].dtype == torch.bfloat16
    assert placed[0].is_contiguous(memory_format=torch.channels_last)
    assert placed[1] is classes
    assert placed[2] == 7
