"""What every sample adds to a peak that was recorded, taken from a simulated peak."""

from __future__ import annotations

from memfit.api.profiling import grown_like
from memfit.records import ModuleShare, Peak, Role, RoleShare


def peak(*roles: RoleShare) -> Peak:
    total = sum(share.num_bytes for share in roles)
    return Peak(
        moment=0,
        phase="backward",
        reserved_bytes=total,
        allocated_bytes=total,
        context_bytes=0,
        roles=roles,
        modules=(ModuleShare(module="", role=Role.INPUTS, num_bytes=total),),
    )


def share(role: Role, num_bytes: int, per_sample: float | None = None) -> RoleShare:
    return RoleShare(role=role, num_bytes=num_bytes, bytes_per_sample=per_sample)


SIMULATED = peak(
    share(Role.INPUTS, 400, 4),
    share(Role.TEMPORARIES, 300, 3),
    share(Role.WORKSPACES, 200, 1),
)


def test_kept_workspaces_are_no_reason_to_know_less() -> None:
    """A record names those that BLAS keeps. What is temporary grows as in the simulation."""
    recorded = peak(
        share(Role.INPUTS, 400), share(Role.TEMPORARIES, 320), share(Role.WORKSPACES, 180)
    )
    found = grown_like(recorded, SIMULATED)
    assert [one.bytes_per_sample for one in found.roles] == [4, 4, 0]


def test_workspaces_of_a_call_are_temporary_in_a_record() -> None:
    """A record does not tell them apart, and the growth of both is one."""
    recorded = peak(share(Role.INPUTS, 400), share(Role.TEMPORARIES, 500))
    found = grown_like(recorded, SIMULATED)
    assert [one.bytes_per_sample for one in found.roles] == [4, 4]


def test_other_bytes_grow_in_a_way_that_is_not_known() -> None:
    """The simulation is believed where it holds what the record holds."""
    recorded = peak(share(Role.INPUTS, 500), share(Role.TEMPORARIES, 300))
    found = grown_like(recorded, SIMULATED)
    assert [one.bytes_per_sample for one in found.roles] == [None, None]
