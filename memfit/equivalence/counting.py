"""Counts in a batch that a loss may average over.

A loss may average over samples, over targets that are not ignored, over the elements that a mask
selects, over given weights, over the weights of classes, or over boxes. Ignored targets are marked
by -100, 255, -1 or another value; targets may be shifted by one place. `weighting` measures which
of these counts a loss uses.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from memfit.equivalence.samples import Samples
from memfit.equivalence.splits import spans
from memfit.records import LossWeighting
from memfit.step.leaves import is_array
from memfit.step.nesting import opened

__all__ = [
    "SAMPLES",
    "SUM",
    "Count",
    "Fit",
    "UnseenClassError",
    "candidates",
    "ignored_everywhere",
    "of_classes",
]


class UnseenClassError(LookupError):
    """The samples that weights were measured on did not contain this class."""


_IGNORED_BYTE = 255
_IGNORED = (-100, _IGNORED_BYTE, -1)
"""Source: torch's cross_entropy; segmentation data sets such as Cityscapes; fairseq and timm."""

_MOST_VALUES = 12
_MOST_CLASSES = 2**16
_ONE_OF_LIST = re.compile(r"\[\d+\]")

Fit = Callable[[torch.Tensor], torch.Tensor]
_Count = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Something that can be counted in a part of a batch.

    Args:
        weighting: The kind of count.
        of: A function of a part of the batch and its number of samples; it returns the count.
        text: The count as an expression of the batch; `None` if it has no name.
        at_least_one: The loss divides by 1 if there is nothing to count, as detection losses do.
        measured: For a rule without a count: a function that measures the factors for a cut.
    """

    weighting: LossWeighting
    of: Callable[[Any, int], float]
    text: str | None = None
    at_least_one: bool = False
    measured: Callable[[Sequence[int], Samples], tuple[float, ...]] | None = None

    def clamped(self) -> Count:
        """Return the count of a loss that divides by 1 if there is nothing to count."""
        text = None if self.text is None else f"{self.text}.clamp(min=1)"
        return dataclasses.replace(self, text=text, at_least_one=True)

    def shares(self, cut: Sequence[int], samples: Samples) -> tuple[float, ...] | None:
        """Return the factor for the loss of each micro-batch.

        Args:
            cut: Samples in each micro-batch.
            samples: The whole batch.

        Returns:
            The factors; `None` if the batch has nothing to count.
        """
        if self.measured is not None:
            return self.measured(cut, samples)
        counts = [self.of(samples.part(*span), span[1] - span[0]) for span in spans(cut)]
        if self.weighting is LossWeighting.SUM:
            return tuple(counts)
        total = sum(counts)
        if self.at_least_one:
            return tuple(max(1.0, count) / max(1.0, total) for count in counts)
        return tuple(count / total for count in counts) if total else None


SAMPLES = Count(weighting=LossWeighting.SAMPLES, of=lambda _part, size: float(size))
SUM = Count(weighting=LossWeighting.SUM, of=lambda _part, _size: 1.0)


def candidates(samples: Samples, held: Iterable[torch.Tensor]) -> Iterator[Count]:
    """Yield the counts that a loss may average over, the most likely first.

    Args:
        samples: The whole batch.
        held: Tensors of the loss or the model that may be weights of classes.
    """
    yield SAMPLES
    yield SUM
    num_samples = samples.num_samples
    tensors = {
        path: values
        for path, values in _by_path(samples.batch).items()
        if len(values) in (1, num_samples) and all(value.ndim > 0 for value in values)
    }
    integers = {path: values for path, values in tensors.items() if _is_integer(values[0])}
    yield from _marked(integers)
    for path, values in tensors.items():
        yield from _of_masks(path, values)
    for path, values in tensors.items():
        if len(values) == num_samples > 1:
            yield _counted(path, f"sum(len(one) for one in {path})", lambda t: torch.ones(len(t)))
    for weights in held:
        for path, values in integers.items():
            if weights.ndim == 1 and all(_are_classes(value, len(weights)) for value in values):
                yield _weighed(path, weights, f"weight[{_only_classes(path, values)}].sum()")


def ignored_everywhere(samples: Samples) -> str | None:
    """Return the part of a batch that has only ignored targets, as text; `None` if there is none.

    Args:
        samples: The whole batch.
    """
    for path, values in _by_path(samples.batch).items():
        if all(_is_integer(value) for value in values):
            found = torch.cat([value.reshape(-1).cpu() for value in values]).unique().tolist()
            if len(found) == 1 and found[0] in _IGNORED:
                return f"{path} is {found[0]} everywhere"
    return None


def _marked(integers: Mapping[str, list[torch.Tensor]]) -> Iterator[Count]:
    """Yield counts of targets that are not marked as ignored.

    Labels that are marked as usual come before masks and tokens that happen to count the same.
    Lengths come before labels that would be marked by an unusual value.
    """
    marks = [(path, value) for path, found in integers.items() for value in _maybe_ignored(found)]
    for is_usual in (True, False):
        for path, value in marks:
            if (value in _IGNORED) is is_usual:
                is_not = functools.partial(_is_not, value)
                yield from _shifted(path, integers[path], f"{{}} != {value}", is_not)
        for path, values in integers.items():
            if is_usual and _are_lengths(values):
                yield from _of_masks(path, values)


def _are_lengths(values: list[torch.Tensor]) -> bool:
    return all(value.ndim == 1 and int(value.min()) > 0 for value in values if value.numel())


def _maybe_ignored(values: list[torch.Tensor]) -> list[int]:
    """Return the integers that may mark ignored targets, the most likely first."""
    found = torch.cat([value.reshape(-1).cpu() for value in values]).unique().tolist()
    known = [value for value in _IGNORED if value in found]
    rest = [value for value in found if value not in known]
    return [*known, *(rest if len(rest) <= _MOST_VALUES else ())]


def _is_not(value: int, targets: torch.Tensor) -> torch.Tensor:
    return targets != value


def _of_masks(path: str, values: list[torch.Tensor]) -> Iterator[Count]:
    if values[0].dtype is torch.bool:
        yield from _shifted(path, values, "{}", torch.clone)
        yield from _shifted(path, values, "~{}", torch.logical_not)
    elif not values[0].is_complex() and all(float(v.min()) >= 0 for v in values if v.numel()):
        yield from _shifted(path, values, "{}", torch.clone)


def of_classes(samples: Samples, cut: Sequence[int], fit: Fit) -> Iterator[Count]:
    """Yield the weights of classes that come nearest to a measured gradient.

    Args:
        samples: The whole batch.
        cut: Samples in each part.
        fit: A function of how often each part contains each class, of shape (parts, classes). It
            returns the weights of the classes.
    """
    parts = [_by_path(samples.part(*span)) for span in spans(cut)]
    for path, values in _by_path(samples.batch).items():
        if not _is_integer(values[0]) or values[0].ndim == 0:
            continue
        if not all(path in part for part in parts):  # one sample of a list
            continue
        flat = torch.cat([value.reshape(-1).cpu() for value in values])
        classes = [value for value in flat.unique().tolist() if value >= 0]
        if not 1 < len(classes) < len(parts) or max(classes) > _MOST_CLASSES:
            continue
        rows = [[float(sum((v == c).sum() for v in part[path])) for c in classes] for part in parts]
        found = fit(torch.tensor(rows, dtype=torch.float64))
        weights = torch.full((max(classes) + 1,), torch.nan, dtype=torch.float64)
        weights[classes] = found / (float(found.abs().max()) or 1.0)
        if float(found.min()) < 0:
            continue
        written = ", ".join(f"{one}: {float(weights[one]):.3g}" for one in classes)
        yield _weighed(path, weights, f"{{{written}}} by the class in {path}")


def _by_path(batch: Any) -> dict[str, list[torch.Tensor]]:
    """Return the tensors of a batch by path; tensors of one list of samples together."""
    found = {path: [leaf] for path, leaf in _leaves(batch, "batch")}
    together: dict[str, list[torch.Tensor]] = {}
    for place, leaves in found.items():
        head, _, tail = place.partition("]")
        name = f"{head}]{_ONE_OF_LIST.sub('[...]', tail)}" if tail else place
        together.setdefault(name, []).extend(leaves)
    # A nested tuple of a few tensors is not a list of samples.
    return found | {name: leaves for name, leaves in together.items() if "[...]" in name}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    container = opened(value)
    if container is not None:
        for key, inner in zip(container.keys, container.values, strict=True):
            yield from _leaves(inner, path + key)
    elif isinstance(value, torch.Tensor):
        yield path, value.to_dense() if value.layout is not torch.strided else value
    elif is_array(value) and value.dtype.kind in "biuf":
        yield path, torch.as_tensor(value)


def _shifted(path: str, values: list[torch.Tensor], text: str, count: _Count) -> Iterator[Count]:
    """Yield a count, and the same count without the first or the last place of each sequence."""
    yield _counted(path, _sum_of(text, path), count)
    if values[0].ndim > 1:
        yield _counted(path, _sum_of(text, f"{path}[:, 1:]"), lambda t: count(t[:, 1:]))
        yield _counted(path, _sum_of(text, f"{path}[:, :-1]"), lambda t: count(t[:, :-1]))


def _sum_of(text: str, place: str) -> str:
    written = text.format(place)
    return f"{written}.sum()" if written == place else f"({written}).sum()"


def _counted(path: str, text: str, count: _Count) -> Count:
    def of(part: Any, _size: int) -> float:
        return float(sum(count(value).double().sum() for value in _by_path(part).get(path, ())))

    return Count(weighting=LossWeighting.TARGETS, of=of, text=text)


def _are_classes(values: torch.Tensor, num_classes: int) -> bool:
    """Whether integers are classes, apart from values that mark ignored targets."""
    return not bool(((values >= num_classes) & (values != _IGNORED_BYTE)).any())


def _only_classes(path: str, values: list[torch.Tensor]) -> str:
    """Return the classes in a part of the batch as an expression, without ignored targets."""
    if any(bool((value < 0).any()) for value in values):
        return f"{path}[{path} >= 0]"
    if any(bool((value == _IGNORED_BYTE).any()) for value in values):
        return f"{path}[{path} != {_IGNORED_BYTE}]"
    return path


def _weighed(path: str, weights: torch.Tensor, text: str) -> Count:
    on_host = weights.detach().double().cpu()

    def of(part: Any, _size: int) -> float:
        total = 0.0
        for value in _by_path(part).get(path, ()):
            classes = value.cpu().reshape(-1)
            classes = classes[classes >= 0]
            if len(on_host) <= _IGNORED_BYTE:
                classes = classes[classes != _IGNORED_BYTE]
            if classes.numel() and int(classes.max()) >= len(on_host):
                raise UnseenClassError(path)
            total += float(on_host[classes].sum())
        if math.isnan(total):
            raise UnseenClassError(path)
        return total

    return Count(weighting=LossWeighting.CLASSES, of=of, text=text)


def _is_integer(tensor: torch.Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
