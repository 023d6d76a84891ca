"""Counts and forces single random numbers that a step draws on the host to choose what it runs.

LayerDrop and stochastic depth draw one number for each layer, and skip the layer for some numbers.
So the memory of a step is random. This module counts such draws, and can force them to one end of
their range. At one of the two ends, all layers run. A short vector that is drawn on the host may
hold one number for each layer, so it is forced too. Other draws of many numbers (dropout, masks,
noise) do not choose layers, so they are not changed.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["ENDS", "Draws"]

_MOST_LAYERS: Final = 64
_LEAST: Final = 2.0**-24
ENDS: Final = (_LEAST, 1 - _LEAST)
"""The values that draws are forced to, as shares of their range. 0 would have no logarithm."""


class Draws:
    """Counts draws of single numbers, and forces them if it has a share.

    Args:
        share: The position of every draw in its range; `None` leaves draws random.
    """

    def __init__(self, share: float | None = None) -> None:
        self.share = share
        self.num_seen = 0

    @contextlib.contextmanager
    def watched(self, *generators: random.Random) -> Iterator[None]:
        """Count and force the draws of Python, NumPy and torch in the block.

        Args:
            *generators: Python's generators that the step owns.
        """
        numpy = sys.modules.get("numpy")
        with contextlib.ExitStack() as stack:
            for owner in (random, *generators):
                for name, forced in _PYTHON.items():
                    stack.enter_context(self._replaced(owner, name, forced, _never))
            for name, forced in {} if numpy is None else _NUMPY.items():
                stack.enter_context(
                    self._replaced(numpy.random, name, forced, _asks_for_many(name))  # type: ignore[union-attr]
                )
            stack.enter_context(_TorchDraws(self))
            yield

    @contextlib.contextmanager
    def _replaced(
        self,
        owner: Any,
        name: str,
        forced: Callable[..., Any],
        asks_for_many: Callable[[tuple[Any, ...], dict[str, Any]], bool],
    ) -> Iterator[None]:
        original = getattr(owner, name)
        # A generator has its methods from its class.
        is_own = name in vars(owner)

        def draw(*args: Any, **kwargs: Any) -> Any:
            if asks_for_many(args, kwargs):
                return original(*args, **kwargs)
            self.num_seen += 1
            drawn = original(*args, **kwargs)
            return drawn if self.share is None else forced(self.share, *args, **kwargs)

        setattr(owner, name, draw)
        try:
            yield
        finally:
            if is_own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)


class _TorchDraws(TorchFunctionMode):
    def __init__(self, draws: Draws) -> None:
        super().__init__()
        self._draws = draws

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        drawn = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name not in _TORCH or not isinstance(drawn, torch.Tensor):
            return drawn
        if drawn.numel() != 1 and not (name in _FOR_LAYERS and _is_short(drawn)):
            return drawn
        self._draws.num_seen += 1
        share = self._draws.share
        if share is not None:
            drawn.detach().fill_(_TORCH[name](share, args, kwargs))
        return drawn


def _is_short(drawn: torch.Tensor) -> bool:
    return drawn.ndim == 1 and 0 < len(drawn) <= _MOST_LAYERS and drawn.device.type == "cpu"


def _never(_args: tuple[Any, ...], _kwargs: dict[str, Any]) -> bool:
    return False


def _asks_for_many(name: str) -> Callable[[tuple[Any, ...], dict[str, Any]], bool]:
    """Return a function that tells whether a call of a NumPy function asks for an array."""
    position = {"rand": 0, "random": 0, "random_sample": 0, "choice": 1}.get(name, 2)
    return lambda args, kwargs: len(args) > position or kwargs.get("size") is not None


def _uniform(share: float, low: float = 0.0, high: float = 1.0, size: None = None) -> float:
    del size
    return low + (high - low) * share


def _of_range(share: float, *bounds: int) -> int:
    numbers = range(*bounds)
    return numbers[int(share * len(numbers))]


def _of_numpy_range(share: float, low: int, high: int | None = None, **_: Any) -> int:
    return _of_range(share, low) if high is None else _of_range(share, low, high)


def _choice(share: float, values: Any, *_: Any, **__: Any) -> Any:
    if isinstance(values, int):
        return _of_range(share, values)
    values = list(values)
    with contextlib.suppress(TypeError, ValueError):  # what is drawn is no number and no size
        values.sort(key=_extent)
    return values[int(share * len(values))]


def _extent(value: Any) -> float:
    """Return a number, or the product of the numbers of a size such as (height, width)."""
    return float(math.prod(value) if isinstance(value, (tuple, list)) else value)


def _of_torch_range(share: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Return what `torch.randint(low, high, size)` draws, of which `low` may be left out."""
    bounds = [value for value in args if isinstance(value, int)]
    bounds += [kwargs[name] for name in ("low", "high") if name in kwargs]
    return float(_of_range(share, *bounds))


_PYTHON: Final[dict[str, Callable[..., Any]]] = {
    "random": _uniform,
    "uniform": _uniform,
    "randrange": _of_range,
    "randint": lambda share, low, high: _of_range(share, low, high + 1),
    "choice": _choice,
    "choices": lambda share, values, *_, k=1, **__: [_choice(share, values)] * k,
}
_NUMPY: Final[dict[str, Callable[..., Any]]] = {
    "rand": _uniform,
    "random": lambda share, **_: _uniform(share),
    "random_sample": lambda share, **_: _uniform(share),
    "uniform": _uniform,
    "randint": _of_numpy_range,
    "choice": _choice,
}
# Functions from the share, the arguments and the keyword arguments to the number that is drawn.
_TORCH: Final[dict[str, Callable[[float, tuple[Any, ...], dict[str, Any]], float]]] = {
    "rand": lambda share, _args, _kwargs: share,
    "rand_like": lambda share, _args, _kwargs: share,
    "uniform_": lambda share, args, kwargs: _uniform(share, *args[1:3], **kwargs),
    "bernoulli": lambda share, _args, _kwargs: float(round(share)),
    "bernoulli_": lambda share, _args, _kwargs: float(round(share)),
    "randint": _of_torch_range,
}
_FOR_LAYERS: Final = ("rand", "rand_like", "uniform_", "bernoulli", "bernoulli_")
