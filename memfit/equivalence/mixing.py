"""Finds the layers that mix the samples of a batch, by changing one sample.

A batch runs through the model unchanged. Then it runs again, each time with one other sample
changed. If a layer's output changes for samples that were not changed, the layer mixes. The old
output of those samples is then restored before the next layer sees it. So each layer is judged
separately, and one pass finds all layers that mix. A row that changes with each of two samples
depends on both. This confirms mixing, however the layer arranges its samples.

Class names are not used. `memfit.equivalence.backward_mixing` finds layers that mix in backward
alone, and `memfit.equivalence.weighting` finds a loss that mixes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from memfit._torch_private import pytree, version_of
from memfit.equivalence.blame import Blame, ValuePlace
from memfit.equivalence.exchange import Exchange
from memfit.equivalence.randomness import rolled_permutations, seed_all
from memfit.equivalence.samples import Samples
from memfit.equivalence.state import same_start
from memfit.records import MixesIn, MixingLayer
from memfit.step.calling import call_model

__all__ = [
    "MOVED",
    "NUM_SAMPLES",
    "MixingSearch",
    "is_inside",
    "is_numbers",
    "is_unseen",
    "judged_again",
    "layer_name",
    "mixing_layers",
    "named_layers",
    "with_values",
]

_Found = TypeVar("_Found")

NUM_SAMPLES = 4
"""Samples that the experiments need: three that run, and one that takes the place of others."""

_SIZES = ((3, 4), (2, 4), (4, 8))  # some models take only even numbers

_NUM_SHARED = 4

# In layers that do not mix, the elements of an unchanged sample are the same bit for bit.
MOVED = 1e-9


@dataclasses.dataclass(frozen=True, slots=True)
class _Suspect:
    """A layer whose output changed for other samples when one sample changed.

    Args:
        layer: The layer to blame.
        moved: The change of the other samples, relative to the norm of the output.
        by_row: The largest change of each row.
    """

    layer: str
    moved: float
    by_row: torch.Tensor


def layer_name(name: str) -> str:
    """Return the name of the layer at a path in reports."""
    return name or "the model itself"


def mixing_layers(
    model: nn.Module, samples: Samples, *, close: float = MOVED
) -> tuple[MixingLayer, ...]:
    """Name the layers whose outputs mix samples, in order of first appearance.

    Args:
        model: The model, in the mode in which it trains.
        samples: Its samples: at least `NUM_SAMPLES` different ones.
        close: The largest change that counts as rounding, relative to an output.

    Returns:
        The layers that mix, each with the change of the other samples.
    """
    sizes = [(num, more) for num, more in _SIZES if more <= samples.num_samples]
    for num, more in sizes:
        # Some models take only batches of certain sizes. If parameters need no gradient, nothing
        # is kept for a backward pass, but a model may differentiate by its own parameters.
        with contextlib.suppress(Exception), _constant_parameters(model):
            return _mixing_layers(model, Exchange(model, samples.first(more), num), close)
    for num, more in sizes[:-1]:
        with contextlib.suppress(Exception):
            return _mixing_layers(model, Exchange(model, samples.first(more), num), close)
    num, more = sizes[-1]
    return _mixing_layers(model, Exchange(model, samples.first(more), num), close)


@contextlib.contextmanager
def _constant_parameters(model: nn.Module) -> Iterator[None]:
    """Let no parameter require a gradient in the block."""
    trained = [one for one in model.parameters() if one.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with warnings.catch_warnings():
            # A reentrant checkpoint warns of it.
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _mixing_layers(model: nn.Module, one: Exchange, close: float) -> tuple[MixingLayer, ...]:
    longer = _shapes(model, one.all_inputs)
    before: dict[ValuePlace, torch.Tensor] = {}

    # Most outputs are also the input of the next layer, and share its copy.
    last: deque[tuple[torch.Tensor, int, torch.Tensor]] = deque(maxlen=_NUM_SHARED)

    def note(_maker: str, key: ValuePlace, leaf: torch.Tensor) -> torch.Tensor:
        now = version_of(leaf)
        same = (copy for tensor, version, copy in last if tensor is leaf and version == now)
        copy = next(same, None)
        if copy is None:
            copy = leaf.detach().clone()
            last.append((leaf, now, copy))
        before[key] = copy
        return leaf

    MixingSearch(note, is_repeating=True).run(model, one.inputs())
    last.clear()
    run = _Run(before=before, longer=longer, close=close, of_one=_of_one_sample(before, longer))
    found, inside = _found(one, run)
    if inside:
        # Some layers sort samples by their values, and put them back: a mixture of experts. So a
        # layer that seems to mix between the layers in it is judged once more, by its outputs.
        by_outputs, _ = _found(one, dataclasses.replace(run, unseen=inside))
        found = judged_again(found, by_outputs, inside)
    return named_layers(model, found)


def judged_again(
    found: Mapping[str, _Found], by_outputs: Mapping[str, _Found], inside: frozenset[str]
) -> dict[str, _Found]:
    """Return what was found, in its order, with some layers judged by their outputs alone.

    Args:
        found: What was found of each layer.
        by_outputs: The same of a run that judged layers by their outputs.
        inside: The layers that are taken from `by_outputs`, where they may be missing.
    """
    judged = {name: one for name, one in by_outputs.items() if name in inside}
    kept = {name: one for name, one in found.items() if name not in inside or name in judged}
    return kept | judged


def named_layers(
    model: nn.Module, moved: Mapping[str, float], mixes_in: MixesIn = MixesIn.FORWARD
) -> tuple[MixingLayer, ...]:
    """Return the layers that mix, from their paths and how far they moved."""
    modules = dict(model.named_modules())
    return tuple(
        MixingLayer(
            name=layer_name(name),
            type_name=type(modules[name]).__name__,
            mixes_in=mixes_in,
            moved=far,
        )
        for name, far in moved.items()
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What one experiment compares with.

    Args:
        before: The values of the unchanged batch.
        longer: The shapes of the values of a larger batch.
        close: The largest change that counts as rounding.
        of_one: Layers and calls that pass on values of single samples.
        unseen: Layers that are judged by their outputs alone.
    """

    before: dict[ValuePlace, torch.Tensor]
    longer: dict[ValuePlace, torch.Size]
    close: float
    of_one: frozenset[tuple[str, int, str]]
    unseen: frozenset[str] = frozenset()


def _of_one_sample(
    before: Mapping[ValuePlace, torch.Tensor], longer: Mapping[ValuePlace, torch.Size]
) -> frozenset[tuple[str, int, str]]:
    """Return the places whose values belong to single samples.

    A list of images has one value more for one sample more. A loop over samples has more calls. It
    cannot be told which sample such a value belongs to, so it is not judged and not put back.
    """

    def counted(places: Mapping[ValuePlace, object]) -> tuple[Counter[Any], Counter[Any]]:
        calls = {(layer, call) for layer, call, _, _ in places}
        return Counter(place[:3] for place in places), Counter(layer for layer, _ in calls)

    (values, calls), (more_values, more_calls) = counted(before), counted(longer)
    return frozenset(
        place
        for place in values
        if values[place] != more_values[place] or calls[place[0]] != more_calls[place[0]]
    )


def _found(one: Exchange, run: _Run) -> tuple[dict[str, float], frozenset[str]]:
    """Return the layers that mix, and those of them that seem to do so between inner layers."""
    first = _suspects(one, 0, run)
    all_seen = [first]
    found: dict[str, float] = {}
    left = set(first)
    # Samples may be mixed in pairs. So each other sample is exchanged, until all is confirmed.
    for sample in range(1, one.num):
        if not left:
            break
        others = _suspects(one, sample, run)
        all_seen.append(others)
        for key in [key for key in first if key in left and key in others]:
            suspect, other = first[key], others[key]
            shared = torch.minimum(suspect.by_row, other.by_row)
            if float(shared.max()) <= run.close * _rms(run.before[key]):
                continue
            left.discard(key)
            moved = max(suspect.moved, other.moved)
            found[suspect.layer] = max(found.get(suspect.layer, 0.0), moved)
    within = {value.layer for seen in all_seen for key, value in seen.items() if key[2] == "in"}
    inside = (layer for layer in found if any(at == layer or is_inside(at, layer) for at in within))
    return found, frozenset(inside)


def is_inside(inner: str, outer: str) -> bool:
    """Whether a layer is inside another one, from their paths in the model."""
    return inner != outer and inner.startswith(f"{outer}." if outer else "")


def is_unseen(maker: str, place: ValuePlace, unseen: frozenset[str]) -> bool:
    """Whether a value is inside a layer that is judged by its outputs alone."""
    layer, _, way, _ = place
    if way == "in" and maker in unseen:
        return True
    return any(is_inside(layer, one) for one in unseen)


def with_values(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return a tensor with other values, whose gradient still flows to the tensor."""
    if not tensor.requires_grad or tensor.shape != values.shape:
        return values
    return tensor + (values - tensor).detach()


def _rms(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) / math.sqrt(max(1, tensor.numel()))


class MixingSearch:
    """One run of a model in which a visitor sees every value that layers pass on.

    Args:
        visit: Called with the layer that made a value, the value's place, and the value. It may
            return another value instead. A layer made its outputs. The inputs of a layer were made
            by the layer around it.
        is_repeating: Visit a value again if a layer passes it on unchanged.
    """

    def __init__(
        self,
        visit: Callable[[str, ValuePlace, torch.Tensor], torch.Tensor],
        *,
        is_repeating: bool = False,
    ) -> None:
        self._visit = visit
        self._is_repeating = is_repeating
        self._calls: dict[str, int] = {}
        self._around: list[str] = []
        self._last: list[tuple[torch.Tensor, int]] = []

    def run(self, model: nn.Module, inputs: Any) -> None:
        """Run the model on inputs."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entered(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._left(name)))
        try:
            # Gradients are on, because a model may differentiate in its forward pass.
            with same_start((model,)), torch.enable_grad(), rolled_permutations():
                seed_all()
                call_model(model, inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _entered(self, name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            call = self._calls[name] = self._calls.get(name, -1) + 1
            maker = self._around[-1] if self._around else None
            self._around.append(name)
            if maker is None:
                return None
            return self._visited(maker, (name, call, "in"), (args, kwargs))

        return hook

    def _left(self, name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            self._around.pop()
            return self._visited(name, (name, self._calls[name], "out"), output)

        return hook

    def _visited(self, maker: str, key: tuple[str, int, str], values: Any) -> Any:
        leaves, spec = pytree.tree_flatten(values)
        seen = [
            self._visit(maker, (*key, index), leaf)
            if is_numbers(leaf) and not self._was_last(leaf)
            else leaf
            for index, leaf in enumerate(leaves)
        ]
        self._last = [(leaf, version_of(leaf)) for leaf in seen if is_numbers(leaf)]
        return pytree.tree_unflatten(seen, spec)

    def _was_last(self, leaf: torch.Tensor) -> bool:
        """Whether a value is the unchanged output of the last layer, which was visited already."""
        if self._is_repeating:
            return False
        return any(leaf is tensor and version_of(leaf) == version for tensor, version in self._last)


def is_numbers(leaf: Any) -> bool:
    """Whether this is a tensor of real or complex numbers, and not of integers."""
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _shapes(model: nn.Module, inputs: Any) -> dict[ValuePlace, torch.Size]:
    shapes: dict[ValuePlace, torch.Size] = {}

    def note(_maker: str, key: ValuePlace, leaf: torch.Tensor) -> torch.Tensor:
        shapes[key] = leaf.shape
        return leaf

    MixingSearch(note, is_repeating=True).run(model, inputs)
    return shapes


def _suspects(one: Exchange, sample: int, run: _Run) -> dict[ValuePlace, _Suspect]:
    found: dict[ValuePlace, _Suspect] = {}
    blame = Blame()

    def compare(maker: str, key: ValuePlace, leaf: torch.Tensor) -> torch.Tensor:
        old = run.before.get(key)
        if is_unseen(maker, key, run.unseen) or key[:3] in run.of_one:
            return leaf
        other_shape = old is not None and old.shape != leaf.shape
        maker = blame.of(maker, key, has_other_shape=other_shape)
        if old is None or old.shape != leaf.shape or leaf.ndim == 0:
            # If the data decides which layers run, there may be no value to compare with. A single
            # number belongs to no sample. If a later layer combines it with samples, that mixes.
            return leaf
        longer, seen = run.longer.get(key), leaf.detach()
        foreign = one.apart_in_others(old, seen, longer, sample)
        if foreign == 0:
            return leaf
        norm = float(torch.linalg.vector_norm(old)) or 1.0
        if not foreign > run.close * norm:
            return leaf
        found[key] = _Suspect(maker, foreign / norm, one.by_row(seen - old, longer))
        others = old.clone()
        own = one.own_rows(others, longer, sample)
        if own is not None:
            own.copy_(one.own_rows(seen, longer, sample))  # type: ignore[arg-type]
        return with_values(leaf, others)

    MixingSearch(compare, is_repeating=bool(run.unseen)).run(one.model, one.inputs(changed=sample))
    return found
