"""Samples are found in batches of every kind of container; unclear batches are refused."""

from __future__ import annotations

import collections
import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from memfit.errors import WorkloadError
from memfit.step.batches import BatchRules, Layout, to_device
from memfit.step.nesting import leaves_of


class Encoding(collections.UserDict[str, Any]):
    """Like a tokenizer's result."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch whose parts have names, and which checks its parts."""

    ids: Any
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale != 1.0:
            raise ValueError("not by its class")


class Pair(NamedTuple):
    """A batch whose parts have names and positions."""

    ids: Any
    labels: Any


class Frozen(Mapping[str, Any]):
    """A mapping that can only be read."""

    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Any:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


PARTS: dict[str, Callable[[int], Any]] = {
    "tensor": torch.arange,
    "array": np.arange,
    "strings": lambda n: [str(i) for i in range(n)],
    "numbers": lambda n: tuple(range(n)),
    "ragged": lambda n: [torch.full((i % 3 + 2, 5), i) for i in range(n)],
    "dictionaries": lambda n: [{"boxes": torch.full((7, 4), i), "name": str(i)} for i in range(n)],
    "sparse": lambda n: torch.arange(1, n + 1)[:, None].to_sparse(),
    "objects": lambda n: [types.SimpleNamespace(index=i) for i in range(n)],
}

CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "dictionary": lambda part: {"part": part, "flag": True, "none": None},
    "ordered": lambda part: collections.OrderedDict(part=part),
    "default": lambda part: collections.defaultdict(list, part=part),
    "user": lambda part: Encoding(part=part),
    "frozen": lambda part: Frozen(part=part),
    "dataclass": Rows,
    "namedtuple": lambda part: Pair(part, torch.tensor(3.0)),
    "namespace": lambda part: types.SimpleNamespace(part=part),
    "list": lambda part: [part, "text"],
}


def samples_of(part: Any) -> list[str]:
    """Return a readable value for each sample of one of the parts."""
    if isinstance(part, torch.Tensor) and part.is_sparse:
        return [str(int(row)) for row in part.to_dense().flatten()]
    if isinstance(part, (torch.Tensor, np.ndarray)):
        return [str(int(row)) for row in part]
    return [str(leaves_of(entry)) for entry in part]


def all_samples(batch: Any) -> list[list[str]]:
    """Return the result of `samples_of` for each part of a batch from `PARTS` in `CONTAINERS`."""
    found = []
    for holder in batch:
        inner = next(iter(holder.values())) if isinstance(holder, Mapping) else holder
        if isinstance(inner, (Rows, types.SimpleNamespace)):
            inner = next(iter(vars(inner).values()))
        elif isinstance(inner, Pair) or (isinstance(inner, list) and inner[-1:] == ["text"]):
            inner = inner[0]
        found.append(samples_of(inner))
    return found


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(PARTS)), st.sampled_from(sorted(CONTAINERS))),
        min_size=1,
        max_size=4,
    ),
    st.integers(8, 13),
    st.data(),
)
def test_whatever_holds_samples_is_cut(
    made_of: list[tuple[str, str]], size: int, data: st.DataObject
) -> None:
    """Tensors, arrays and lists are cut in all containers; each part has its share."""
    batch = (
        *(CONTAINERS[container](PARTS[part](size)) for part, container in made_of),
        torch.arange(size),
    )
    layout = Layout.of(batch, BatchRules(num_inputs=len(made_of)))
    assert layout.num_samples == size
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    whole, part = all_samples(batch), all_samples(layout.take(batch, start, stop))
    assert part == [samples[start:stop] for samples in whole]
    assert all_samples(batch) == whole
    assert all_samples(layout.resized(batch, size + 3)) == [s + s[:3] for s in whole]
    order = data.draw(st.permutations(range(size)))
    assert all_samples(layout.reordered(batch, order)) == [[s[i] for i in order] for s in whole]


def test_containers_keep_their_classes() -> None:
    """Attributes are still there, and parts that are not per sample do not change."""
    batch: dict[str, Any] = {
        "rows": Rows(torch.arange(6)),
        "pair": Pair(torch.arange(6), ["a"] * 6),
        "user": Encoding(ids=torch.arange(6)),
        "scale": torch.tensor(2.0),
        "name": "batch",
    }
    part = Layout.of(batch).take(batch, 2, 4)
    assert isinstance(part["rows"], Rows)
    assert isinstance(part["pair"], Pair)
    assert isinstance(part["user"], Encoding)
    assert part["pair"].labels == ["a", "a"]
    assert part["scale"] is batch["scale"]
    assert part["name"] == "batch"
    assert part["user"]["ids"].data_ptr() == batch["user"]["ids"][2:].data_ptr()  # a view


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_cut(layout: torch.layout) -> None:
    """Both layouts are cut sample by sample."""
    nested = torch.nested.nested_tensor(
        [torch.full((length, 2), float(length)) for length in (3, 1, 4, 1, 5)], layout=layout
    )
    batch = (nested, torch.arange(5))
    part, labels = Layout.of(batch).take(batch, 1, 4)
    assert [float(sample.sum()) for sample in part.unbind()] == [2, 32, 2]
    assert labels.tolist() == [1, 2, 3]
    resized, _ = Layout.of(batch).resized(batch, 7)
    assert [len(sample) for sample in resized.unbind()] == [3, 1, 4, 1, 5, 3, 1]


def test_packed_sequences_are_cut() -> None:
    """They are cut by sequences, and not by the time steps in which they are packed."""
    lengths = (2, 5, 3, 1)
    sequences = [torch.full((length, 2), float(length)) for length in lengths]
    batch = (pack_sequence(sequences, enforce_sorted=False), torch.tensor(lengths))
    part, labels = Layout.of(batch).take(batch, 1, 4)
    assert pad_packed_sequence(part)[1].tolist() == labels.tolist() == [5, 3, 1]
    placed, _ = to_device(batch, torch.device("cpu"), is_private=True)
    assert placed.data.data_ptr() != batch[0].data.data_ptr()


def test_sequences_that_were_packed_as_sorted_are_picked_in_any_order() -> None:
    """Their order may then be another, and the layers still give each its own state."""
    sequences = [torch.full((length, 2), float(length)) for length in (5, 3, 3, 1)]
    batch = (pack_sequence(sequences), torch.arange(4))
    layout = Layout.of(batch)
    part, labels = layout.reordered(batch, [3, 0, 2])
    assert pad_packed_sequence(part)[1].tolist() == [1, 5, 3]
    assert labels.tolist() == [3, 0, 2]
    assert layout.reordered(batch, [0, 3])[0].sorted_indices is None
    assert int(layout.resized(batch, 6)[0].batch_sizes[0]) == 6


def test_a_list_of_arguments_is_no_list_of_samples() -> None:
    """It is a list of inputs or targets, and may have as many entries as there are rows."""
    batch = ([torch.zeros(2, 3), torch.ones(2, 3)], [torch.zeros(2), torch.ones(2)])
    layout = Layout.of(batch)
    assert layout.num_samples == 2
    assert not layout.is_one_each(0)
    assert not layout.is_one_each(1)
    part = layout.take(batch, 1, 2)
    assert [tuple(leaf.shape) for leaf in leaves_of(part)] == [(1, 3), (1, 3), (1,), (1,)]


def test_a_list_of_samples_is_one_argument() -> None:
    """Images of different sizes, or texts, are the inputs."""
    images = [torch.zeros(3, 8 + i, 8) for i in range(5)]
    for inputs in (images, ["a", "b", "c", "d", "e"]):
        layout = Layout.of((inputs, torch.arange(5)))
        assert layout.num_samples == 5
        assert layout.is_one_each(0)


DETECTION = (
    [torch.zeros(3, 8 + i, 8) for i in range(6)],
    [{"boxes": torch.zeros(3, 4), "labels": torch.zeros(3)} for _ in range(6)],
)


def test_as_many_boxes_as_channels_are_refused() -> None:
    """Six images of three channels with three boxes each could be six samples or three."""
    with pytest.raises(WorkloadError, match=r"as 6 samples \(batch\[0\]\) or as 3 \(batch\[0\]\["):
        Layout.of(DETECTION, BatchRules(num_inputs=2))
    told = BatchRules(num_inputs=2, dims={"batch[0]": 0})
    assert Layout.of(DETECTION, told).num_samples == 6
    fewer = [{"boxes": torch.zeros(2, 4)} for _ in range(6)]
    assert Layout.of((DETECTION[0], fewer), BatchRules(num_inputs=2)).num_samples == 6


def labelled_images(batch_size: int) -> list[Any]:
    return [(torch.zeros(3, 8, 8), index) for index in range(batch_size)]


@pytest.mark.parametrize(
    "samples",
    [
        labelled_images(7),
        [{"image": torch.zeros(3, 8, 8), "label": torch.tensor(1)} for _ in range(7)],
        [torch.zeros(3, 8, 8) for _ in range(7)],
        [Pair(torch.zeros(8), torch.tensor(1)) for _ in range(7)],
    ],
)
def test_a_batch_that_is_a_list_of_samples(samples: list[Any]) -> None:
    """A loader that collates nothing gives such lists. They are never cut by channel."""
    with pytest.raises(WorkloadError, match=r"list of 7 entries of the same kind.* \(batch,\)"):
        Layout.of(samples)
    with pytest.raises(WorkloadError, match=r"as 7 samples \(batch\[0\]\) or as [38] "):
        Layout.of((samples,))
    layout = Layout.of((samples,), BatchRules(dims={"batch[0]": 0}))
    layout.certain()
    assert layout.num_samples == 7
    assert layout.is_one_each(0)
    (part,) = layout.take((samples,), 2, 5)
    assert len(part) == 3


def test_a_function_that_makes_lists_of_samples() -> None:
    """Two batch sizes show what the entries are."""
    layout = Layout.of((labelled_images(7),), num_samples=7, other=((labelled_images(8),), 8))
    (part,) = layout.take((labelled_images(7),), 0, 4)
    assert [label for _, label in part] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "batch",
    [
        ([torch.zeros(7, 3, 8, 8), torch.zeros(7, 3, 4, 4)],),
        ([torch.zeros(7, 5), torch.zeros(7, 5)],),
        ([{"ids": torch.zeros(7, 5)}, {"ids": torch.zeros(7, 5)}], torch.zeros(7)),
        ({"ids": torch.zeros(7, 5)}, {"ids": torch.zeros(7, 5)}),
        (torch.zeros(7, 5, 2), torch.zeros(7, 5, 2), torch.zeros(7, 5, 2)),
    ],
)
def test_views_and_pairs_are_no_lists_of_samples(batch: Any) -> None:
    """Crops, views, and two alike dictionaries each hold all samples."""
    layout = Layout.of(batch)
    layout.certain()
    assert layout.num_samples == 7
    assert all(len(leaf) == 2 for leaf in leaves_of(layout.take(batch, 0, 2)))


def test_two_batches_tell_what_one_does_not() -> None:
    """A part that grows with the batch size holds samples, in any dimension; others do not."""

    def make(size: int) -> Any:
        return {
            "images": [torch.zeros(3, 8, 8)] * size,
            "boxes": [torch.zeros(3, 4)] * size,
            "mask": torch.zeros(6, 6),
            "sequence": torch.zeros(9, size, 2),
            "names": ["cat", "dog"],
        }

    layout = Layout.of(make(6), num_samples=6, other=(make(7), 7))
    part = layout.take(make(6), 0, 4)
    assert len(part["images"]) == len(part["boxes"]) == 4
    assert part["mask"].shape == (6, 6)
    assert part["sequence"].shape == (9, 4, 2)
    assert part["names"] == ["cat", "dog"]
