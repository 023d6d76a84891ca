"""Optimizers of packages besides torch and timm: bitsandbytes' and torchao's, by their names.

Their states have 8 or 4 bits for each number, or lie in pages that the driver moves to the host
(bitsandbytes' `Paged...`). timm knows some of bitsandbytes' by names of its own (`bnbadamw8bit`).
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from torch import nn
from torch.optim import Optimizer

from memfit.errors import NotSimulatedError, UsageError

__all__ = ["check_package", "is_packaged", "made", "without_package"]

_PACKAGES: Final = ("bitsandbytes", "torchao")
_BITS_AND_BYTES_OF_TIMM: Final = "bnb"
_WITH_BITS: Final = re.compile(r"(paged)?_?([a-z]+?)_?(8|4)_?bit")
# It lacks what `torch.optim.Optimizer` sets up, and steps on the CPU.
_OF_THE_HOST: Final = "CPUOffloadOptimizer"
_WHY: Final = "its own kernels run on a GPU only"
# Loggers that warn of torchao's own affairs when it is imported: torch's, of a call that torchao
# makes and torch holds for outdated, and its own, of kernels that it has for another torch.
_WARN_AT_IMPORT: Final = ("torch.utils._pytree", "torchao")


def is_packaged(name: str) -> bool:
    """Whether an optimizer is named by its package and class, such as `torchao.AdamW8bit`."""
    return name.partition(".")[0] in _PACKAGES and "." in name


def check_package(name: str) -> None:
    """Refuse the name of an optimizer whose package is not there, or has no such class.

    Args:
        name: A name of timm's, or a package and a class of its `optim`.

    Raises:
        UsageError: The package is not installed, or it has no such optimizer.
    """
    if name.startswith(_BITS_AND_BYTES_OF_TIMM):
        _check_installed(name, "bitsandbytes")
    if is_packaged(name):
        package, _, wanted = name.partition(".")
        _check_installed(name, package)
        known = _classes_of(package)
        if wanted == _OF_THE_HOST:
            raise UsageError(
                f"{name} steps on the CPU and is no ordinary optimizer of torch's: rehearse a "
                "script with it, memfit rehearse --gpu NAME -- python train.py."
            )
        if wanted not in known:
            near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else f": {', '.join(known)}."
            raise UsageError(f"{package} has no optimizer {wanted!r}{hint}")


def without_package(name: str) -> str:
    """Return a question with the names of both packages, for a name such as `adamw8bit`."""
    found = _WITH_BITS.fullmatch(name.lower())
    if found is None:
        return ""
    paged, base, bits = found.groups()
    named = [
        f"{package}.{kind}"
        for package in _PACKAGES
        if importlib.util.find_spec(package) is not None
        for kind in _classes_of(package)
        if kind.lower() == f"{paged or ''}{base}{bits}bit"
    ]
    if named:
        return f"; did you mean {' or '.join(named)}?"
    return "; optimizers with 8 bits are bitsandbytes.AdamW8bit and torchao.AdamW8bit."


def made(
    name: str, groups: list[dict[str, Any]], model: nn.Module, *, learning_rate: float
) -> Optimizer:
    """Make an optimizer of a package.

    Args:
        name: Its package and class.
        groups: Groups of parameters.
        model: The model, whose device decides whether its kernels can run.
        learning_rate: The learning rate.

    Raises:
        NotSimulatedError: The model is on the meta device.
        UsageError: The package cannot make it here.
    """
    check_package(name)
    if next(model.parameters()).is_meta:
        raise NotSimulatedError.because(f"The optimizer {name}", _WHY)
    package, _, wanted = name.partition(".")
    factory: Callable[..., Optimizer] = getattr(_optimizers_of(package), wanted)
    try:
        return factory(groups, lr=learning_rate)
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        why = str(error) or type(error).__name__
        raise UsageError(f"The optimizer {name} cannot be tried: {why}") from error


def _check_installed(name: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UsageError(
            f"The optimizer {name} needs {package}, which is not installed: pip install {package}."
        )


def _classes_of(package: str) -> list[str]:
    found = vars(_optimizers_of(package))
    return [
        name
        for name, value in found.items()
        if isinstance(value, type)
        and issubclass(value, Optimizer)
        and not name.startswith("_")
        and name not in (_OF_THE_HOST, "Optimizer")
    ]


def _optimizers_of(package: str) -> Any:
    try:
        with _without_lines_of(*_WARN_AT_IMPORT):
            return importlib.import_module(f"{package}.optim")
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(f"{package} cannot be imported: {error}") from error


@contextlib.contextmanager
def _without_lines_of(*names: str) -> Iterator[None]:
    """Drop what some loggers write in the block. Levels and handlers stay as the user set them."""

    def drop(_record: logging.LogRecord) -> bool:
        return False

    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(drop)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(drop)
