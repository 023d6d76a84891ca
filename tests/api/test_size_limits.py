"""Operators that take only so many samples, however much memory is free."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memfit


class Refusing(nn.Module):
    """Fails as a kernel whose grid is too small for so many samples."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.layer = nn.Linear(1024, 1024)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return numbers of the shape of the inputs."""
        if len(inputs) > self.most:
            raise RuntimeError("CUDA error: invalid configuration argument\nSearch for it")
        outputs: torch.Tensor = self.layer(inputs)
        return outputs


def probe(most: int) -> memfit.ProbeResult:
    """Search for the largest batch size under a real limit."""
    batch = (torch.zeros(2, 1024), torch.zeros(2, 1024))
    workload = memfit.Workload(Refusing(most), batch, nn.functional.mse_loss, "sgd")
    return memfit.probe(workload, device="cpu", memory="100MiB", max_batch_size=200)


def test_the_largest_that_the_operator_takes_is_the_answer() -> None:
    """It was tried, and the one beyond it is named with the operator's own error."""
    result = probe(37)
    assert (result.max_batch_size, result.edge_found) == (37, False)
    assert [trial.batch_size for trial in result.trials if not trial.fits] == []
    assert 37 in [trial.batch_size for trial in result.trials]
    (remark,) = result.remarks
    assert remark.startswith("Batch size 38 fails however much memory is free")
    assert "(CUDA error: invalid configuration argument)" in remark


def test_one_sample_that_is_refused_raises_the_operators_own_error() -> None:
    """No batch size cures it."""
    with pytest.raises(RuntimeError, match="invalid configuration argument"):
        probe(0)
