"""Published accuracies of timm's pretrained weights on ImageNet, and the weights' licences.

The figures are in `accuracies.csv` beside this module; its first lines say where they come from and
when. `benchmarks/accuracies.py` makes the file. Nothing here measures, and nothing is downloaded.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from importlib import resources

from memfit.records import Record

__all__ = ["Accuracy", "accuracies", "accuracy_source", "best_of"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy(Record):
    """What some pretrained weights reach.

    Args:
        model: The model's name with the tag of its weights.
        image_size: The side of the images in pixels, as evaluated.
        top1_percent: Right first answers on the 50,000 images of ImageNet's validation set.
        licence: The licence of the weights, as timm names it.
    """

    model: str
    image_size: int
    top1_percent: float
    licence: str

    @property
    def architecture(self) -> str:
        """The model's name without the tag."""
        return self.model.partition(".")[0]


@functools.cache
def _read() -> tuple[str, tuple[Accuracy, ...]]:
    text = resources.files(__package__).joinpath("accuracies.csv").read_text(encoding="utf-8")
    lines = text.splitlines()
    notes = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    found = (
        Accuracy(
            model=row["model"],
            image_size=int(row["image_size"]),
            top1_percent=float(row["top1_percent"]),
            licence=row["licence"],
        )
        for row in rows
    )
    return " ".join(notes), tuple(sorted(found, key=lambda each: -each.top1_percent))


def accuracies() -> tuple[Accuracy, ...]:
    """Return every published accuracy, the best first."""
    return _read()[1]


def accuracy_source() -> str:
    """Return where the accuracies come from, with the date, in a sentence."""
    return _read()[0]


@functools.cache
def _best() -> dict[str, Accuracy]:
    best: dict[str, Accuracy] = {}
    for each in accuracies():
        best.setdefault(each.architecture, each)
        best.setdefault(each.model, each)
    return best


def best_of(model: str) -> Accuracy | None:
    """Return the best accuracy of a model's weights.

    Args:
        model: The model's name. With a tag, only these weights count.

    Returns:
        The accuracy; `None` if none is published.
    """
    return _best().get(model)
