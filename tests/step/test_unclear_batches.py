"""Batches in which samples cannot be told are refused, and the advice of the error works."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memfit.errors import UsageError, WorkloadError
from memfit.step.batches import BatchRules, Layout, batch_size_of
from memfit.step.nesting import leaves_of

SHARED_MASK = ((torch.zeros(4, 6, 8), torch.zeros(6, 6)), torch.zeros(4))
GRAPH = (
    {"x": torch.zeros(20, 8), "edges": torch.zeros(2, 48), "batch": torch.zeros(20)},
    torch.zeros(4),
)


class Opaque:
    """A container of samples that memfit does not know."""

    def __init__(self) -> None:
        self.boxes = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ("text", "no tensor with a leading dimension"),
        (
            SHARED_MASK,
            (
                r"batch\[0\]\[0\] has 4 and batch\[0\]\[1\] has 6; give batch_dims="
                r"\{'batch\[0\]\[1\]': None\} if that part belongs to all samples, or cut=function"
            ),
        ),
        (
            (torch.zeros(5, 7, 8), torch.zeros(7)),
            r"to all samples, batch_dims=\{'batch\[0\]': 1\} if dimension 1 counts them, or",
        ),
        (
            GRAPH,
            (
                r"batch\[0\]\['edges'\] has 2 and batch\[0\]\['x'\] has 20; give cut=function, a "
                r"function cut\(batch, start, stop\) that returns those samples; to search, a"
            ),
        ),
        (
            (torch.zeros(6, 6, 8), torch.zeros(6, 6)),
            r"batch\[1\] is 6 x 6 beside 6 samples of length 6",
        ),
        (
            (torch.zeros(8, 2), ["a", "b", "c"]),
            r"batch\[0\] has 8 and batch\[1\] has 3; give batch_dims=\{'batch\[1\]': None\}",
        ),
        (
            {"x": torch.zeros(4), "o": Opaque()},
            r"where batch\['o'\], of the class Opaque, has its samples\. Give batch_dims=",
        ),
        (
            {"crops": [torch.zeros(8, 3), torch.zeros(8, 3)]},
            r"as 2 samples \(batch\['crops'\]\) or as 8",
        ),
        (
            {"x": torch.zeros(2), "crops": [torch.zeros(2, 3), torch.zeros(2, 3)]},
            r"a list in it has 2 entries whose leading dimension is 2 as well \(batch\['crops'\]\)",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(batch: Any, says: str) -> None:
    """One sentence says what does not fit, and what to give."""
    with pytest.raises(WorkloadError, match=says):
        Layout.of(batch).certain()


@pytest.mark.parametrize(
    ("batch", "dims", "shapes"),
    [
        (SHARED_MASK, {"batch[0][1]": None}, [(2, 6, 8), (6, 6), (2,)]),
        (
            (torch.zeros(6, 6, 8), torch.zeros(6, 6)),
            {"batch[1]": None},
            [(2, 6, 8), (6, 6)],
        ),
        ((torch.zeros(6, 6, 8), torch.zeros(6, 6)), {1: 0}, [(2, 6, 8), (2, 6)]),
        ({"x": torch.zeros(9, 4, 2), "y": torch.zeros(4)}, {"x": 1}, [(9, 2, 2), (2,)]),
        ((torch.zeros(8, 2), ["a", "b", "c"]), {"batch[1]": None}, [(2, 2)]),
        (
            {"crops": [torch.zeros(8, 3), torch.zeros(8, 3)]},
            {"batch['crops'][0]": 0},
            [(2, 3), (2, 3)],
        ),
        (
            {"crops": [torch.zeros(8, 3), torch.zeros(8, 3), torch.zeros(8, 3)]},
            {"crops": 0},
            [(8, 3), (8, 3)],
        ),
        ({"x": torch.zeros(4), "o": Opaque()}, {"o": None}, [(2,)]),
    ],
)
def test_what_errors_advise_works(
    batch: Any, dims: dict[str | int, int | None], shapes: list[tuple[int, ...]]
) -> None:
    """The same batches are cut when the advice is followed."""
    layout = Layout.of(batch, BatchRules(dims=dims))
    layout.certain()
    tensors = [x for x in leaves_of(layout.take(batch, 0, 2)) if isinstance(x, torch.Tensor)]
    assert [tuple(tensor.shape) for tensor in tensors] == shapes


def test_a_function_of_the_users_cuts_what_slices_do_not() -> None:
    """For graphs the targets give the number of samples, or a function counts them."""

    def cut(batch: Any, start: int, stop: int) -> Any:
        graphs, targets = batch
        return {"x": graphs["x"][5 * start : 5 * stop]}, targets[start:stop]

    layout = Layout.of(GRAPH, BatchRules(cut=cut))
    assert layout.num_samples == 4
    graphs, targets = layout.take(GRAPH, 1, 3)
    assert len(graphs["x"]) == 10
    assert len(targets) == 2
    assert len(layout.resized(GRAPH, 3)[1]) == 3
    with pytest.raises(WorkloadError, match="Give a function of the batch size"):
        layout.resized(GRAPH, 9)
    with pytest.raises(WorkloadError, match="Give count=function as well as cut"):
        Layout.of(GRAPH[0], BatchRules(cut=cut))
    counted = BatchRules(cut=cut, count=lambda batch: len(batch[0]["x"]) // 5)
    assert Layout.of(GRAPH, counted).num_samples == 4
    wrong = BatchRules(cut=lambda batch, _start, _stop: batch, count=lambda batch: 4)
    with pytest.raises(WorkloadError, match="returned 4 samples when asked for 2"):
        Layout.of(GRAPH, wrong).take(GRAPH, 0, 2)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        (
            {"dims": {"batch['z']": None}},
            r"which the batch does not have; the nearest is \"batch\['x'\]",
        ),
        ({"dims": {"x": -1}}, r"batch_dims\['x'\] must be a dimension from 0, or None"),
        ({"dims": ["x"]}, "batch_dims must be a dictionary, not list"),
        ({"cut": 3}, "cut must be a function, not int"),
        ({"count": lambda _batch: None}, "must return a whole number from 1, not None"),
    ],
)
def test_rules_that_say_nothing_are_refused(rules: dict[str, Any], says: str) -> None:
    """The message has the nearest part, or what the rule has to be."""
    with pytest.raises((UsageError, WorkloadError), match=says):
        Layout.of({"x": torch.zeros(4)}, BatchRules(**rules))


def test_what_is_known_of_one_batch_holds_for_the_next() -> None:
    """A short last batch may be unclear alone; it is cut like those before it."""

    def batch(size: int) -> Any:
        return {"crops": [torch.zeros(size, 3)] * 3, "y": torch.zeros(size)}

    known = Layout.of(batch(8))
    short = known.again(batch(3))
    assert short.num_samples == 3
    assert [len(crop) for crop in short.take(batch(3), 0, 2)["crops"]] == [2, 2, 2]
    with pytest.raises(WorkloadError, match="3 entries whose leading dimension is 3 as well"):
        Layout.of(batch(3)).certain()
    with pytest.raises(WorkloadError, match="leading dimensions differ"):
        known.again({"crops": [torch.zeros(4, 3)] * 3, "y": torch.zeros(5)})


def test_inputs_and_targets_of_other_lengths_are_a_mistake_first() -> None:
    """The first advice is to look at the batch; it was to share the images among all samples."""
    with pytest.raises(WorkloadError) as caught:
        Layout.of((torch.zeros(8, 3, 4, 4), torch.zeros(4)))
    said = str(caught.value)
    assert "batch[0] has 8 and batch[1] has 4. Both need one entry for each sample" in said
    assert said.index("look at how the batch is made") < said.index("batch_dims={'batch[0]': None}")
    assert "batch_dims={'batch[1]': None}" in said


def test_one_sample_needs_no_cut() -> None:
    """In a batch of one sample every part is unclear, but it is used whole."""
    batch = {"crops": [torch.zeros(1, 3)]}
    layout = Layout.of(batch)
    assert layout.num_samples == batch_size_of(batch) == 1
    assert layout.take(batch, 0, 1) is batch
