"""Random draws, replayed sample by sample.

A batch that is cut draws other random numbers than the whole one, and dropout then looks like a
difference that accumulation made. `Draws` notes what the full batch drew and gives each micro-batch
its own samples' rows of it. Draws that a fused kernel makes inside itself cannot be replayed; the
layers that make them are named, so that they can be switched off.
"""

from __future__ import annotations

import abc
import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from memfit._torch_private import aten_if_there, dispatched, schema_of
from memfit.equivalence.calls import CallStack

__all__ = ["Draws", "seed_all"]

_SEED = 20_221

# What fills or returns a tensor with random numbers and nothing else.
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
_LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)


def seed_all() -> None:
    """Seed Python, NumPy (where it is loaded), torch and every device."""
    random.seed(_SEED)
    torch.manual_seed(_SEED)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(_SEED)


class Draws:
    """Notes the random draws of a full batch and replays them for its parts.

    Args:
        model: Whose layers the draws are ascribed to.
        num_samples: Samples in the full batch.
    """

    def __init__(self, model: nn.Module, num_samples: int) -> None:
        self._model = model
        self._num_samples = num_samples
        self._recorded: list[torch.Tensor] = []
        self._dims: dict[int, int] = {}
        self.drawing: dict[str, None] = {}
        self.not_replayable: dict[str, None] = {}
        self.narrowed: torch.dtype | None = None

    def record(self, drawn: torch.Tensor) -> None:
        """Take note of the next draw of the full batch."""
        self._recorded.append(drawn.clone())

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Note what is drawn in the block."""
        self._recorded.clear()
        self._dims.clear()
        with self._mode(_Recording(self)):
            yield

    @contextlib.contextmanager
    def replayed(self, start: int, stop: int) -> Iterator[None]:
        """Give the block what samples `start` up to and without `stop` drew in the full batch."""

        def rows(index: int, shape: torch.Size) -> torch.Tensor | None:
            return self._rows(index, shape, start, stop)

        with self._mode(_Replaying(self, rows)):
            yield

    @contextlib.contextmanager
    def replayed_in(self, order: torch.Tensor) -> Iterator[None]:
        """Give the block the full batch's draws with its samples in another order.

        Which dimension is the samples' shows when a part of the batch is replayed: do that first.
        """

        def rows(index: int, shape: torch.Size) -> torch.Tensor | None:
            drawn = self._drawn(index)
            if drawn is None or drawn.shape != shape or index not in self._dims:
                return drawn if drawn is not None and drawn.shape == shape else None
            per_sample = drawn.shape[self._dims[index]] // self._num_samples
            wanted = order[:, None] * per_sample + torch.arange(per_sample)
            return drawn.index_select(self._dims[index], wanted.flatten().to(drawn.device))

        with self._mode(_Replaying(self, rows)):
            yield

    @contextlib.contextmanager
    def _mode(self, mode: _Mode) -> Iterator[None]:
        with CallStack(self._model) as stack, dispatched(mode.handle):
            mode.stack = stack
            # Decisions of Python and NumPy, such as skipping a layer, are the batch's as a whole.
            seed_all()
            yield

    def _drawn(self, index: int) -> torch.Tensor | None:
        return self._recorded[index] if index < len(self._recorded) else None

    def _rows(self, index: int, shape: torch.Size, start: int, stop: int) -> torch.Tensor | None:
        """Return the rows of a draw that belong to some samples; `None` where they cannot be told.

        The dimension that changed its length is the samples'; it may hold several rows for each,
        as windows and attention heads do.
        """
        drawn = self._drawn(index)
        if drawn is None or drawn.shape == shape:
            return drawn
        if len(drawn.shape) != len(shape):
            return None
        changed = [d for d, (a, b) in enumerate(zip(drawn.shape, shape, strict=True)) if a != b]
        dim = changed[0]
        per_sample, rest = divmod(drawn.shape[dim], self._num_samples)
        if len(changed) > 1 or rest or shape[dim] != per_sample * (stop - start):
            return None
        self._dims[index] = dim
        return drawn.narrow(dim, start * per_sample, shape[dim])


class _Mode(abc.ABC):
    """What recording and replaying share: which operators draw, and in which layer."""

    def __init__(self, draws: Draws) -> None:
        self.draws = draws
        self.stack: CallStack | None = None

    def handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator, or serve what it draws."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            out = func(*args, **kwargs)
            self._note_narrowing(func, args, out)
            return out
        name = schema_of(func).name.removeprefix("aten::")
        layer = self.stack.innermost if self.stack is not None else ""
        if name in _DRAWS:
            self.draws.drawing[layer] = None
            return self.draw(func, args, kwargs)
        if _is_random(func, args, kwargs):
            self.draws.drawing[layer] = None
            self.draws.not_replayable[layer] = None
        return func(*args, **kwargs)

    @abc.abstractmethod
    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve an operator that draws."""

    def not_replayable(self) -> None:
        layer = self.stack.innermost if self.stack is not None else ""
        self.draws.not_replayable[layer] = None

    def _note_narrowing(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """Notice a model that computes partly in a narrower type than its weights'."""
        if func is not aten_if_there("_to_copy.default") or not isinstance(out, torch.Tensor):
            return
        if args[0].dtype is torch.float64 and out.dtype in _LOW_PRECISION and args[0].ndim > 0:
            before = self.draws.narrowed
            if before is None or torch.finfo(out.dtype).eps > torch.finfo(before).eps:
                self.draws.narrowed = out.dtype


class _Recording(_Mode):
    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        drawn = out[1] if isinstance(out, tuple) else out
        self.draws.record(drawn)
        return out


class _Replaying(_Mode):
    def __init__(
        self, draws: Draws, rows: Callable[[int, torch.Size], torch.Tensor | None]
    ) -> None:
        super().__init__(draws)
        self._rows = rows
        self._next = 0

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index, self._next = self._next, self._next + 1
        out = func(*args, **kwargs)
        drawn = out[1] if isinstance(out, tuple) else out
        rows = self._rows(index, drawn.shape)
        if rows is None:
            self.not_replayable()
            return out
        drawn.copy_(rows)
        if not isinstance(out, tuple):
            return out
        # native_dropout(input, p, train) -> (input * mask / (1 - p), mask)
        return args[0] * drawn.to(args[0].dtype) / (1 - args[1]), drawn


def _is_random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator that may draw does; fused attention does so only with dropout."""
    names = [argument.name for argument in schema_of(func).arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    if "dropout_p" in given:
        return bool(given["dropout_p"])
    return "dropout_p" not in names
