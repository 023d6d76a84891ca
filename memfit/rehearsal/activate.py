"""Puts a rehearsed card in front of torch, in a child process or in this process.

The library replaces CUDA's runtime and driver only if it is loaded before torch. A child process
gets it by `LD_PRELOAD`. This process gets it if `rehearse` is called before `import torch`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from memfit.cards import REHEARSED_CARD_VARIABLE, Gpu, find_gpu, oldest_cudnn
from memfit.errors import UnsupportedError, UsageError
from memfit.rehearsal.build import LIBRARY, NVML_LIBRARY, library_folder
from memfit.units import parse_bytes
from memfit.user_cache import cache_folder

__all__ = [
    "CARD_VARIABLE",
    "MAX_GPUS",
    "check_supported",
    "load_without_card",
    "rehearse",
    "rehearsed_environment",
    "show_driver",
]

CARD_VARIABLE = REHEARSED_CARD_VARIABLE
"""The environment variable from which the device reads the card."""

MAX_GPUS = 16
_LIBRARIES = (LIBRARY, NVML_LIBRARY)
_MACHINES = ("x86_64", "aarch64")
_CUDA_WITHOUT_VOLTA: Final = 13
_TURING: Final = (7, 5)
_INSTEAD = (
    "The simulation works here: `memfit probe MODEL --gpu NAME --engine simulate`, or in Python "
    'memfit.probe(model, gpu=..., engine="simulate").'
)


def rehearse(gpu: str, *, memory: str | int | None = None, num_gpus: int = 1) -> None:
    """Rehearse a card from now on, in this process and in the processes that it starts.

    Call it before torch is imported. torch then finds that card. Its own allocator, its autograd
    and its choice of kernels run as on the card, but the kernels do nothing. The rehearsal lasts
    until the process ends.

    Args:
        gpu: The card's name, as in `"RTX 4090"`.
        memory: The memory of the card, as in `"16GiB"`, instead of the catalogue's figure.
        num_gpus: The number of such cards that this process sees.

    Raises:
        UsageError: There is no such card, or torch is already imported, or another card is already
            rehearsed.
        UnsupportedError: This system cannot rehearse.
    """
    total_bytes = None if memory is None else parse_bytes(memory)
    card = find_gpu(gpu, total_bytes=total_bytes)
    check_supported(card)
    settings = _settings(card, num_gpus=num_gpus, others_bytes=0)
    if CARD_VARIABLE in os.environ and _is_loaded():
        if os.environ[CARD_VARIABLE] == settings:
            return
        raise UsageError(
            "This process already rehearses a card, so it cannot rehearse "
            f"{card.name}. Start a new process for each card."
        )
    if "torch" in sys.modules:
        raise UsageError(
            f"torch is already imported, so this process cannot rehearse {card.name}. "
            "Call memfit.rehearse before anything imports torch."
        )
    environment = rehearsed_environment(card, num_gpus=num_gpus, environment=os.environ)
    _load()
    os.environ.update(environment)


def load_without_card(card: Gpu) -> bool:
    """Put the device in front of torch in this process, and show no GPU to this process.

    A fork of this process can then rehearse a card without importing torch again.

    Args:
        card: The first card that a fork will rehearse.

    Returns:
        `False` if that is not possible: torch is imported, or a card is rehearsed already, or this
        system cannot rehearse the card.
    """
    if "torch" in sys.modules or CARD_VARIABLE in os.environ:
        return False
    try:
        rehearsed_environment(card)
    except (UnsupportedError, UsageError):
        return False
    _load()
    return True


def show_driver() -> None:
    """Let libraries of this process find a driver of CUDA, on a machine that has none.

    It is the rehearsed device's, without a card: CUDA finds no device, as before.
    """
    if sys.platform == "linux" and platform.machine() in _MACHINES:
        with contextlib.suppress(UnsupportedError, OSError):
            ctypes.CDLL(str(library_folder() / LIBRARY))


def rehearsed_environment(
    card: Gpu,
    *,
    num_gpus: int = 1,
    others_bytes: int = 0,
    environment: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return the environment variables that make a child process rehearse a card.

    Args:
        card: The card. Its `total_bytes` may differ from the catalogue's.
        num_gpus: The number of such cards that the child sees, 1 to 16.
        others_bytes: The bytes that other processes hold on each card.
        environment: The child's other variables. Libraries that they preload are kept.

    Returns:
        The variables to add.

    Raises:
        UsageError: The number of GPUs is out of range, or the card is not NVIDIA's.
        UnsupportedError: This system cannot rehearse.
    """
    check_supported(card)
    folder = library_folder()
    if re.search(r"[\s:]", str(folder)):
        raise UnsupportedError(
            "The compiled device of a rehearsal cannot be loaded from "
            f"{str(folder)!r}, because a space or a colon ends a name in "
            "LD_PRELOAD. Set XDG_CACHE_HOME to another folder."
        )
    libraries = [str(folder / name) for name in _LIBRARIES]
    before = (environment or {}).get("LD_PRELOAD", "")
    others = [name for name in before.replace(" ", ":").split(":") if name not in ("", *libraries)]
    return {
        "LD_PRELOAD": ":".join([*libraries, *others]),
        CARD_VARIABLE: _settings(card, num_gpus=num_gpus, others_bytes=others_bytes),
        # Triton looks for the driver in the linker's cache, which does not list loaded libraries.
        "TRITON_LIBCUDA_PATH": str(folder),
        # Kernels are chosen by time, and here no time is real: a real run must not find the choice.
        "TORCHINDUCTOR_CACHE_DIR": str(cache_folder() / "inductor"),
        # A variable that hides a real GPU must not hide the rehearsed one.
        "CUDA_VISIBLE_DEVICES": ",".join(str(index) for index in range(num_gpus)),
    }


def check_supported(card: Gpu) -> None:
    """Refuse a card that this system cannot rehearse, and say why in a sentence.

    Raises:
        UsageError: The card is not NVIDIA's.
        UnsupportedError: Another system than Linux, another processor, a torch without CUDA, a card
            that is older than this torch's CUDA supports, or one that its cuDNN cannot describe.
    """
    if card.vendor != "NVIDIA":
        raise UsageError(
            f"Only NVIDIA's cards can be rehearsed, and {card.name} is {card.vendor}'s. {_INSTEAD}"
        )
    if sys.platform != "linux":
        raise UnsupportedError(f"A rehearsal needs Linux; this is {platform.system()}. {_INSTEAD}")
    if platform.machine() not in _MACHINES:
        raise UnsupportedError(
            f"A rehearsal needs an {' or '.join(_MACHINES)} processor; this is "
            f"{platform.machine()}. {_INSTEAD}"
        )
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise UnsupportedError("A rehearsal needs torch, which is not installed.")
    libraries = Path(spec.origin).parent / "lib"
    if not (libraries / "libtorch_cuda.so").exists():
        # It imports `email`, which no `--help` should wait for.
        from importlib import metadata

        kind = "is built for ROCm" if (libraries / "libtorch_hip.so").exists() else "has no CUDA"
        raise UnsupportedError(
            f"A rehearsal needs a torch that is built for CUDA; torch "
            f"{metadata.version('torch')} {kind}. {_INSTEAD}"
        )
    found = re.search(
        r"^cuda\b.*(\d\d)\.\d", _text_of(libraries.parent / "version.py"), re.MULTILINE
    )
    cuda = 0 if found is None else int(found[1])
    if cuda >= _CUDA_WITHOUT_VOLTA and card.compute_capability < _TURING:
        raise UnsupportedError(
            f"{card.name} has compute capability {card.architecture}. This torch is built for CUDA "
            f"{cuda}, which begins at 7.5, so it cannot train on such a card. A torch for CUDA "
            f"12 can. {_INSTEAD}"
        )
    cudnn, oldest = _cudnn_release(cuda), oldest_cudnn(card.compute_capability)
    if cudnn < oldest:
        raise UnsupportedError(
            f"cuDNN {cudnn[0]}.{cudnn[1]} cannot choose kernels for {card.name} without the card. "
            f"cuDNN {oldest[0]}.{oldest[1]} can, and torch 2.11 brings a newer one. {_INSTEAD}"
        )


def _cudnn_release(cuda: int) -> tuple[int, int]:
    """Return the release of the cuDNN that came with torch; a high one if it is unknown."""
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError, ValueError):
        major, minor, *_ = metadata.version(f"nvidia-cudnn-cu{cuda}").split(".")
        return int(major), int(minor)
    return sys.maxsize, 0


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _load() -> None:
    for name in _LIBRARIES:
        ctypes.CDLL(str(library_folder() / name), mode=ctypes.RTLD_GLOBAL)


def _settings(card: Gpu, *, num_gpus: int, others_bytes: int) -> str:
    if not 1 <= num_gpus <= MAX_GPUS:
        raise UsageError(f"A process can rehearse 1 to {MAX_GPUS} GPUs, not {num_gpus}.")
    major, minor = card.compute_capability
    values = {
        "name": card.name.replace(";", ","),
        "total_bytes": card.total_bytes,
        "context_bytes": card.context_bytes,
        "others_bytes": others_bytes,
        "capability": f"{major}.{minor}",
        "multiprocessors": card.multiprocessors,
        "num_gpus": num_gpus,
    }
    return ";".join(f"{key}={value}" for key, value in values.items())


def _is_loaded() -> bool:
    """Whether this process already has the device, by `LD_PRELOAD` or by `rehearse`."""
    return hasattr(ctypes.CDLL(None), "memfit_rehearsal_version")
