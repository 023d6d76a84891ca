"""torch's switches, as data that another process takes."""

from __future__ import annotations

import pickle

import torch

from memfit.memory.switches import set_switches, switches


def test_switches_are_thrown_back() -> None:
    """What was told is set again, in this process as in another one."""
    before = switches()
    told = pickle.loads(pickle.dumps(before))  # noqa: S301 - made here
    assert {"cudnn.benchmark", "cudnn.allow_tf32", "flash_sdp", "deterministic"} <= told.keys()
    try:
        torch.backends.cudnn.benchmark = not before["cudnn.benchmark"]
        torch.backends.cuda.enable_flash_sdp(not before["flash_sdp"])
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        torch.set_float32_matmul_precision("high")
        changed = {name for name, value in switches().items() if value != before[name]}
        precision = "float32 matmul precision"
        assert changed == {"cudnn.benchmark", "flash_sdp", "deterministic", precision}
    finally:
        set_switches(told)
    assert switches() == before


def test_only_what_differs_is_set() -> None:
    """A switch that this torch does not have is left out."""
    before = switches()
    set_switches({**before, "no switch of this torch": True})
    assert switches() == before
