"""Python's garbage collector is paused and put back."""

from __future__ import annotations

import gc

import pytest

import memfit
from memfit.memory.collector import collector_paused, old_objects_set_aside


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("for_good", [True, False])
def test_the_collector_is_put_back_as_it_was(enabled: bool, for_good: bool) -> None:
    """This holds for any earlier state, and whatever happens in between."""
    was_enabled, num_frozen = gc.isenabled(), gc.get_freeze_count()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(KeyError), collector_paused(for_good=for_good):
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is enabled
        # Python itself may have frozen some objects.
        assert gc.get_freeze_count() <= num_frozen
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_what_stays_joins_the_oldest_generation() -> None:
    """Objects that a user has frozen stay frozen."""
    with collector_paused(for_good=True):
        made: list[list[int]] = [[] for _ in range(1000)]
    oldest = {id(thing) for thing in gc.get_objects(generation=2)}
    assert all(id(thing) in oldest for thing in made)
    gc.freeze()
    try:
        with collector_paused(for_good=True):
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_a_simulation_leaves_what_is_frozen() -> None:
    """Objects that a user froze stay frozen, and no others become frozen."""
    with old_objects_set_aside():
        assert gc.get_freeze_count()
    assert not gc.get_freeze_count()
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        memfit.estimate("test_vit", 1, gpu="rtx3090")
        # Frozen objects die like others; none is unfrozen, which would make the collector walk it.
        assert gc.get_freeze_count() > 0.9 * frozen
    finally:
        gc.unfreeze()
