"""Memory is released, also what another thread still holds for a moment."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from memfit.memory.release import release, release_down_to
from memfit.units import MIB


@pytest.mark.gpu
def test_what_a_thread_still_holds_is_waited_for() -> None:
    """A thread of autograd drops the tensors of a failed backward after the error is raised."""
    device = torch.device("cuda", torch.cuda.current_device())
    held_bytes = release(device)
    held = [torch.empty(4 * MIB, device=device)]

    def drop_later() -> None:
        time.sleep(0.1)
        held.clear()

    thread = threading.Thread(target=drop_later)
    thread.start()
    assert release_down_to(device, held_bytes) == held_bytes
    assert torch.cuda.memory_reserved(device) <= held_bytes + 2 * MIB
    thread.join()


@pytest.mark.gpu
def test_what_stays_is_not_waited_for_without_end() -> None:
    """A leak is told and not waited for."""
    device = torch.device("cuda", torch.cuda.current_device())
    held_bytes = release(device)
    kept = torch.empty(4 * MIB, device=device)
    assert release_down_to(device, held_bytes) == held_bytes + kept.nbytes
