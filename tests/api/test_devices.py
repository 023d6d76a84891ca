"""Names of devices, and counts, in every public function that takes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_workload

import memfit
from memfit.errors import UnknownDeviceError

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "probe": memfit.probe,
    "plan": lambda subject, **options: memfit.plan(subject, 8, **options),
    "verify": lambda subject, **options: memfit.verify(
        subject, micro_batch_size=2, accumulation_steps=2, **options
    ),
    "profile": lambda subject, **options: memfit.profile(subject, 2, **options),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("gpu", "'gpu' is not a device: give cpu, cuda or cuda:0; a GPU is called cuda"),
        ("cuda:x", "'cuda:x' is not a device"),
        ("mps", "cannot measure on 'mps'"),
        ("cuda:99", "no 'cuda:99'" if torch.cuda.is_available() else "no GPU for 'cuda:99'"),
    ],
)
def test_a_device_that_is_none_gets_a_sentence(function: str, device: str, says: str) -> None:
    """An unknown device is refused for a name and for a workload."""
    for subject in ("test_vit", small_workload()):
        with pytest.raises(UnknownDeviceError, match=says):
            FUNCTIONS[function](subject, device=device, precision="fp32")


def test_counts_of_numpy_are_counts() -> None:
    """They come from sweeps over sizes; a size may also be written 1e9."""
    card: dict[str, Any] = {"gpu": "rtx3090", "engine": "simulate"}
    trial = memfit.estimate("test_vit", np.int64(2), **card)
    assert type(trial.batch_size) is int
    planned = memfit.plan("test_vit", np.int64(64), multiple_of=np.int64(8), **card)
    assert type(planned.multiple_of) is int
    result = memfit.probe("test_vit", memory=1e9, max_batch_size=np.int64(64), **card)
    assert result.max_batch_size <= 64
