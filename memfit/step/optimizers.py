"""What an optimizer steps, and which optimizers are refused.

Those that compute the loss again within their step are refused. L-BFGS computes the loss several
times in one step, and SAM computes it twice. Both take a function (a closure) that runs forward and
backward over the whole batch. With accumulated gradients there is no such function. Adahessian
differentiates gradients once more, so it needs a graph that was dropped.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator

from torch import nn
from torch.optim import Optimizer

from memfit.errors import WorkloadError

__all__ = [
    "check_steps_alone",
    "check_steps_model",
    "required_arguments",
    "stepped_by",
    "without_closure",
]


def check_steps_alone(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose step needs a closure, or the graph of the gradients.

    Raises:
        WorkloadError: The optimizer needs either.
    """
    # timm's mark for optimizers that need backward(create_graph=True).
    if getattr(optimizer, "is_second_order", False):
        raise WorkloadError(
            f"{type(optimizer).__name__} differentiates the gradients once more, which needs "
            "backward(create_graph=True). memfit's steps do not keep that graph. Train with an "
            "optimizer that needs gradients only, or use this one in your own loop."
        )
    is_sam = hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")
    if not is_sam and "closure" not in required_arguments(optimizer.step):
        return
    raise _needs_closure(optimizer)


def check_steps_model(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer that would not change the model.

    Raises:
        WorkloadError: The optimizer was made for another model.
    """
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for parameter in stepped_by(optimizer)):
        raise WorkloadError(
            "The optimizer holds no parameter of the model. Make it from this model: "
            f"{type(optimizer).__name__}(model.parameters(), ...)."
        )


@contextlib.contextmanager
def without_closure(optimizer: Optimizer) -> Iterator[None]:
    """Step an optimizer in the block, and explain its error if it asks for a closure.

    Some optimizers have a default for the closure, and refuse that default when they step.

    Raises:
        WorkloadError: The optimizer needs a closure.
    """
    try:
        yield
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if "closure" not in str(error):
            raise
        raise _needs_closure(optimizer) from error


def _needs_closure(optimizer: Optimizer) -> WorkloadError:
    return WorkloadError(
        f"{type(optimizer).__name__} runs forward and backward again in its own "
        "step, through a closure. memfit runs each micro-batch once before an "
        "optimizer step. Train with an optimizer that needs no closure, or use "
        "this one in your own loop."
    )


def required_arguments(function: Callable[..., object]) -> tuple[str, ...]:
    """Return the names of the arguments without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()
    positional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind not in positional
    )


def stepped_by(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """Yield the parameters that an optimizer steps."""
    for group in optimizer.param_groups:
        yield from group["params"]
