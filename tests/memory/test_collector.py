"""The collector, paused and put back as it was."""

from __future__ import annotations

import gc

import pytest

from memfit.memory.collector import collector_paused


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("for_good", [True, False])
def test_the_collector_is_put_back_as_it_was(enabled: bool, for_good: bool) -> None:
    """Whatever it was, and whatever happens meanwhile."""
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(KeyError), collector_paused(for_good=for_good):
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is enabled
        assert not gc.get_freeze_count()
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
