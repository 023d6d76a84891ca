"""A search for the largest batch size of a function, in place of Accelerate's decorator.

Source: huggingface/accelerate, src/accelerate/utils/memory.py (`find_executable_batch_size`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from memfit.errors import DoesNotFitError, UnsupportedError
from memfit.memory import oom
from memfit.memory.release import release
from memfit.units import parse_count

__all__ = ["find_executable_batch_size"]

_NUM_STEPS: Final = 3


class _EnoughSteps(BaseException):
    """Ends a trial of `find_executable_batch_size`. A user's `except Exception` lets it through."""


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    *,
    num_steps: int = _NUM_STEPS,
) -> Any:
    """Run a function with the largest batch size that fits, up to a given one.

    It is used as Accelerate's decorator of the same name. That one multiplies the batch size by 0.9
    after each failure, so it ends below the edge. This one searches for the edge: a trial runs the
    function until its optimizer has stepped a few times. Then the function runs to its end with the
    largest batch size that fits.

    Args:
        function: A function whose first argument is the batch size. It makes everything that
            depends on it, because it is started several times.
        starting_batch_size: The largest batch size that is tried.
        num_steps: The optimizer steps of a trial. The optimizer's state is there after the first.

    Returns:
        The function without its first argument; without `function`, a decorator.

    Raises:
        UsageError: A number is not valid.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            num_steps=num_steps,
        )
    ceiling = parse_count("starting_batch_size", starting_batch_size)
    steps = parse_count("num_steps", num_steps)

    @functools.wraps(function)
    def at_the_edge(*args: Any, **kwargs: Any) -> Any:
        _refuse_ranks()
        low, high = 0, ceiling + 1  # `low` fits, and `high` runs out or is not wanted
        batch_size = ceiling
        message = None
        while high - low > 1:
            message = _out_of_memory_in(
                functools.partial(function, batch_size, *args, **kwargs), steps
            )
            low, high = (batch_size, high) if message is None else (low, batch_size)
            batch_size = (low + high) // 2
        if low == 0:
            raise DoesNotFitError(
                f"{getattr(function, '__name__', 'The function')} runs out of memory even with a "
                f"batch size of 1: {message}"
            )
        return function(low, *args, **kwargs)

    return at_the_edge


def _refuse_ranks() -> None:
    """Refuse to search in several processes, which would end at different batch sizes.

    Raises:
        UnsupportedError: There are several processes.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        ranks = distributed.get_world_size()
        if ranks > 1:
            raise UnsupportedError(
                f"With {ranks} processes each would search for a batch size of its own: plan with "
                f"memfit.plan(..., world_size={ranks})."
            )


def _out_of_memory_in(run: Callable[[], Any], num_steps: int) -> str | None:
    """Run a function until optimizers have stepped so often, or to its end.

    Returns:
        The first line of the error if it ran out of memory; `None` if it did not.
    """
    num_done = 0

    def count(*_: Any) -> None:
        nonlocal num_done
        num_done += 1
        if num_done >= num_steps:
            raise _EnoughSteps

    handle = register_optimizer_step_post_hook(count)
    message = None
    try:
        run()
    except _EnoughSteps:
        pass
    except Exception as error:
        if oom.classify(error) is oom.Likelihood.NO:
            raise
        message = oom.first_line(error)
    finally:
        handle.remove()
    release(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return message
