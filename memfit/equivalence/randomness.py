"""Random draws, replayed sample by sample.

A batch that is cut draws other random numbers than the whole batch. Then dropout looks like a
difference caused by accumulation. `Draws` records what the full batch drew, and gives each
micro-batch the rows of its own samples. Draws inside a fused kernel cannot be replayed. The layers
with such draws are named, so that they can be switched off.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from memfit._torch_private import dispatched, schema_of
from memfit.equivalence.calls import CallStack

__all__ = ["Draws", "rolled_permutations", "seed_all"]

_SEED = 20_221

# Operators that return random numbers, or fill a tensor with them, and do nothing else.
# Source: aten/src/ATen/native/native_functions.yaml, tag nondeterministic_seeded.
_DRAWS = frozenset(
    (
        *("bernoulli", "bernoulli_", "binomial", "cauchy_", "exponential_", "geometric_"),
        *("log_normal_", "multinomial", "native_dropout", "normal", "normal_"),
        *("normal_functional", "poisson", "rand", "rand_like", "randint", "randint_like", "randn"),
        *("randn_like", "random", "random_", "randperm", "uniform", "uniform_"),
        *("_sample_dirichlet", "_standard_gamma"),
    )
)
_GOLDEN = 0.618_034  # multiples of it spread evenly between 0 and 1


def seed_all() -> None:
    """Seed Python, NumPy (if it is loaded), torch and every device."""
    random.seed(_SEED)
    torch.manual_seed(_SEED)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(_SEED)


@contextlib.contextmanager
def rolled_permutations() -> Iterator[None]:
    """Make every random permutation in the block move each element by one place.

    One of the six permutations of three elements changes nothing, and would hide that samples mix.
    """

    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        if schema_of(func).name == "aten::randperm":
            out.copy_(torch.arange(out.numel(), device=out.device).roll(1))
        return out

    with dispatched(run):
        yield


class Draws:
    """Records the random draws of a full batch and replays them for its parts.

    It sees every operation. So it also records which parameters are used, and whether gradients
    were enabled in any of these uses.

    Args:
        model: The model; each draw is assigned to one of its layers.
        num_samples: Samples in the full batch.
        held_fixed: Give every sample the same value instead. Then it does not matter which sample a
            draw belongs to.
    """

    def __init__(self, model: nn.Module, num_samples: int, *, held_fixed: bool = False) -> None:
        self._model = model
        self._num_samples = num_samples
        self.held_fixed = held_fixed
        self._recorded: dict[str, list[tuple[torch.Tensor, object]]] = {}
        self._dims: dict[tuple[str, int], int] = {}
        self.drawing: dict[str, None] = {}
        self.not_replayable: dict[str, None] = {}
        self.by_host = False
        self.batch_changed = False
        self.used: dict[int, bool] = collections.defaultdict(bool)

    def record(self, layer: str, drawn: torch.Tensor, drawn_from: object) -> None:
        """Record a layer's next draw for the full batch, and the range that it was drawn from."""
        self._recorded.setdefault(layer, []).append((drawn.clone(), drawn_from))

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the draws in the block."""
        self._recorded.clear()
        self._dims.clear()
        with self._mode(_Fixed(self) if self.held_fixed else _Recording(self)):
            yield

    @contextlib.contextmanager
    def replayed(self, start: int, stop: int) -> Iterator[None]:
        """Replay the full batch's draws for the samples from `start` up to but not `stop`."""
        mode = self._replaying(
            lambda draw: self._rows(draw, start, stop), lambda place: start + place
        )
        with self._mode(mode):
            yield

    @contextlib.contextmanager
    def replayed_in(self, order: torch.Tensor) -> Iterator[None]:
        """Replay the full batch's draws with its samples in another order.

        Replay a part of the batch first, because that shows which dimension counts the samples.
        """

        def in_order(draw: _Draw) -> torch.Tensor | None:
            drawn = self._drawn(draw, draw.index)
            dim = self._dims.get((draw.layer, draw.index))
            if drawn is None or drawn.shape != draw.shape or dim is None:
                return drawn if drawn is not None and drawn.shape == draw.shape else None
            per_sample = drawn.shape[dim] // self._num_samples
            wanted = order[:, None] * per_sample + torch.arange(per_sample)
            return drawn.index_select(dim, wanted.flatten().to(drawn.device))

        with self._mode(self._replaying(in_order, lambda place: int(order[place]))):
            yield

    def _replaying(
        self,
        by_rows: Callable[[_Draw], torch.Tensor | None],
        sample_at: Callable[[int], int],
    ) -> _Mode:
        """Return the mode that replays draws.

        Args:
            by_rows: A function that finds a draw's numbers in the rows of a recorded draw.
            sample_at: A function from a sample's place in the part to its place in the full batch.
        """

        def rows(draw: _Draw) -> torch.Tensor | None:
            found = by_rows(draw), self._of_loop(draw, sample_at)
            return _first(found[::-1] if self._is_loop(draw.layer) else found)

        return _Fixed(self) if self.held_fixed else _Replaying(self, rows)

    @contextlib.contextmanager
    def _mode(self, mode: _Mode) -> Iterator[None]:
        with CallStack(self._model) as stack, dispatched(mode.handle):
            mode.stack = stack
            # Python and NumPy draw for the batch as a whole, for example to skip a layer.
            seed_all()
            before = _host_states()
            yield
        self.by_host = self.by_host or _host_states() != before

    def _drawn(self, draw: _Draw, index: int) -> torch.Tensor | None:
        """Return one of the recorded draws of a layer, if it was drawn from the same range."""
        recorded = self._recorded.get(draw.layer, [])
        if index >= len(recorded):
            return None
        drawn, same = recorded[index]
        # A position in a larger batch may not exist in a smaller one.
        return drawn if draw.drawn_from == same else None

    def _rows(self, draw: _Draw, start: int, stop: int) -> torch.Tensor | None:
        """Return the rows of a draw that belong to some samples; `None` if this cannot be told.

        The dimension that changed its length counts the samples. It may have several rows for each
        sample, for example for windows and attention heads.
        """
        shape = draw.shape
        drawn = self._drawn(draw, draw.index)
        if drawn is None or drawn.shape == shape:
            return drawn
        if len(drawn.shape) != len(shape):
            return None
        changed = [d for d, (a, b) in enumerate(zip(drawn.shape, shape, strict=True)) if a != b]
        dim = changed[0]
        per_sample, rest = divmod(drawn.shape[dim], self._num_samples)
        if len(changed) > 1 or rest or shape[dim] != per_sample * (stop - start):
            return None
        self._dims[draw.layer, draw.index] = dim
        return drawn.narrow(dim, start * per_sample, shape[dim])

    def _of_loop(self, draw: _Draw, sample_at: Callable[[int], int]) -> torch.Tensor | None:
        """Return a draw of a layer that draws for one sample after the other.

        Args:
            draw: The draw.
            sample_at: A function from a sample's place in the part to its place in the full batch.
        """
        per_sample, rest = divmod(len(self._recorded.get(draw.layer, ())), self._num_samples)
        if rest or not per_sample:
            return None
        place, which = divmod(draw.index, per_sample)
        if place >= self._num_samples:
            return None
        drawn = self._drawn(draw, sample_at(place) * per_sample + which)
        return drawn if drawn is not None and drawn.shape == draw.shape else None

    def _is_loop(self, layer: str) -> bool:
        """Whether a layer seems to draw for one sample after the other: some draws have no rows."""
        recorded = self._recorded.get(layer, ())
        return len({drawn.shape for drawn, _ in recorded}) > 1 and not all(
            drawn.ndim and len(drawn) % self._num_samples == 0 for drawn, _ in recorded
        )


def _first(found: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    return next((one for one in found if one is not None), None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Draw:
    """A draw that is to be replayed: its layer, and how many draws the layer made before it."""

    layer: str
    index: int
    shape: torch.Size
    drawn_from: object


class _Mode(abc.ABC):
    """Shared by recording and replaying: finds operators that draw, and their layers."""

    def __init__(self, draws: Draws) -> None:
        self.draws = draws
        self.stack: CallStack | None = None

    def handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator, or return its draw; record which parameters it uses."""
        for one in args:
            if isinstance(one, nn.Parameter):
                self.draws.used[id(one)] |= torch.is_grad_enabled()
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = schema_of(func).name.removeprefix("aten::")
        layer = self._layer
        if name in _DRAWS:
            self.draws.drawing[layer] = None
            return self.draw(func, args, kwargs)
        if _is_random(func, args, kwargs):
            self.draws.drawing[layer] = None
            self.draws.not_replayable[layer] = None
        return func(*args, **kwargs)

    @abc.abstractmethod
    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operator that draws."""

    @property
    def _layer(self) -> str:
        return self.stack.innermost if self.stack is not None else ""

    def not_replayable(self) -> None:
        self.draws.not_replayable[self._layer] = None


class _Recording(_Mode):
    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        drawn = out[1] if isinstance(out, tuple) else out
        self.draws.record(self._layer, drawn, _drawn_from(func, args, kwargs))
        return out


class _Replaying(_Mode):
    def __init__(self, draws: Draws, rows: Callable[[_Draw], torch.Tensor | None]) -> None:
        super().__init__(draws)
        self._rows = rows
        self._next: collections.Counter[str] = collections.Counter()

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self._layer
        index, self._next[layer] = self._next[layer], self._next[layer] + 1
        out = func(*args, **kwargs)
        drawn = out[1] if isinstance(out, tuple) else out
        drawn_from = _drawn_from(func, args, kwargs)
        rows = self._rows(_Draw(layer=layer, index=index, shape=drawn.shape, drawn_from=drawn_from))
        if rows is None:
            self.not_replayable()
            return out
        drawn.copy_(rows)
        return _with_mask(out, drawn, args)


class _Fixed(_Mode):
    """Gives all elements of a draw one value, which depends on the number of earlier draws."""

    def __init__(self, draws: Draws) -> None:
        super().__init__(draws)
        self._share = 0.5

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._share = (self._share + _GOLDEN) % 1
        out = func(*args, **kwargs)
        drawn = out[1] if isinstance(out, tuple) else out
        given = _given(func, args, kwargs)
        name = schema_of(func).name.removeprefix("aten::").rstrip("_")
        if name == "randperm":
            # Neighbours mix, as in any permutation except the one that changes nothing.
            drawn.copy_(torch.arange(drawn.numel(), device=drawn.device).roll(1))
        elif name.startswith(("bernoulli", "native_dropout")):
            drawn.fill_(1)
        elif name.startswith("randint"):
            low, high = given.get("low", 0), given["high"]
            drawn.fill_(low + int(self._share * (high - low)))
        elif name.startswith(("rand", "normal")) and name != "random":
            spread = given.get("std", 1.0)
            mean = given.get("mean", 0.0)
            is_normal = name.startswith(("randn", "normal"))
            if isinstance(spread, float) and isinstance(mean, float):
                drawn.fill_(mean + spread * (2 * self._share - 1) if is_normal else self._share)
        elif name == "uniform":
            low, high = given.get("from", 0.0), given.get("to", 1.0)
            drawn.fill_(low + self._share * (high - low))
        elif drawn.numel():
            drawn.fill_(1)  # a value that all other distributions can give
        return _with_mask(out, drawn, args)


def _with_mask(out: Any, drawn: torch.Tensor, args: tuple[Any, ...]) -> Any:
    if not isinstance(out, tuple):
        return out
    # native_dropout(input, p, train) -> (input * mask / (1 - p), mask)
    return args[0] * drawn.to(args[0].dtype) / (1 - args[1]), drawn


def _given(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in schema_of(func).arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _drawn_from(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """Return the range that integers are drawn from; another range is another draw."""
    given = _given(func, args, kwargs)
    name = schema_of(func).name.removeprefix("aten::")
    if name == "multinomial":
        choices = given["self"]
        return name, choices.shape[-1] if choices.ndim == 1 else None
    return name, given.get("n"), given.get("low"), given.get("high")


def _host_states() -> tuple[object, ...]:
    """Return the states of Python's and NumPy's generators."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    _, keys, position, *_ = numpy.random.get_state()
    return random.getstate(), keys.tobytes(), position


def _is_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of an operator draws; fused attention draws only with dropout."""
    given = _given(func, args, kwargs)
    if "dropout_p" in given:
        return bool(given["dropout_p"])
    return all(argument.name != "dropout_p" for argument in schema_of(func).arguments)
