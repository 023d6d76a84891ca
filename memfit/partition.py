"""Micro-batch x accumulation steps x ranks = effective batch, exactly.

It computes with what trials have shown. It knows no torch and runs nothing. What other options of
the step could reach is decided elsewhere (`memfit.planning`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

from memfit.errors import UsageError
from memfit.records import Objective
from memfit.units import parse_count

__all__ = [
    "Parts",
    "Speed",
    "check_target",
    "cut",
    "equal_part",
    "share_of",
    "shares_by",
    "sizes_to_time",
    "smallest_of",
    "split",
    "too_small",
]

# Two timings closer than this are the same: trials are short.
_TIMING_NOISE = 0.02
# So many halvings below the largest micro-batch are timed.
_NUM_HALVINGS = 3
# Equal parts smaller than this part of the largest micro-batch are remarked upon.
_FAR_BELOW = 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast a micro-batch trains, as measured.

    Args:
        batch_size: Samples in the micro-batch.
        samples_per_second: What was measured.
    """

    batch_size: int
    samples_per_second: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """One rank's share of an effective batch, cut.

    Args:
        sizes: Samples in each micro-batch, larger ones first.
        samples_per_second: What the rank trains; `None` where nothing was measured.
        remarks: What there is to say about it, in sentences.
    """

    sizes: tuple[int, ...]
    samples_per_second: float | None
    remarks: tuple[str, ...]


def check_target(effective_batch_size: object, world_size: object = 1) -> tuple[int, int]:
    """Refuse an effective batch that cannot be planned.

    Args:
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: Ranks that share them.

    Returns:
        Both, as the whole numbers that they are.

    Raises:
        UsageError: One is not a whole number or is less than 1, or there are more ranks than
            samples.
    """
    samples = parse_count("The effective batch size", effective_batch_size)
    ranks = parse_count("The world size", world_size)
    if samples < ranks:
        raise UsageError(
            f"An effective batch of {samples} cannot be shared by {ranks} ranks, "
            f"because each rank needs at least one sample. Give at least {ranks}."
        )
    return samples, ranks


def share_of(effective_batch_size: int, world_size: int) -> int:
    """Return the samples that the first rank takes: no rank takes more."""
    return -(-effective_batch_size // world_size)


def shares_by(effective_batch_size: int, limits: Sequence[int]) -> tuple[int, ...]:
    """Share samples by what ranks can take at a time, so that all need equally many micro-batches.

    Args:
        effective_batch_size: Samples to share, at least one for each rank.
        limits: Each rank's largest micro-batch, at least 1.

    Returns:
        Each rank's samples, at least 1. If n times the limits are enough for all samples, no rank
        gets more than n times its limit.
    """
    total = sum(limits)
    shares = [effective_batch_size * limit // total for limit in limits]
    # What rounding has left over goes to the ranks that lost most by it.
    by_loss = sorted(
        range(len(limits)),
        key=lambda rank: (-(effective_batch_size * limits[rank] % total), rank),
    )
    for rank in by_loss[: effective_batch_size - sum(shares)]:
        shares[rank] += 1
    for rank, share in enumerate(shares):
        if share == 0:
            shares[shares.index(max(shares))] -= 1
            shares[rank] = 1
    return tuple(shares)


def cut(
    num_samples: int, largest: int, *, multiple_of: int = 1, smallest: int = 2
) -> tuple[int, ...]:
    """Cut samples into the fewest parts, as equal as they can be.

    All parts but one are multiples of `multiple_of`, as long as `largest` leaves room for one. A
    part that would be too small takes from all others, and then none is a multiple.

    Args:
        num_samples: Samples to cut, at least 1.
        largest: The most samples in a part, at least 1.
        multiple_of: What parts are multiples of, at least 1.
        smallest: The fewest samples in a part, where that can be: batch norm may refuse one.

    Returns:
        The parts, larger ones first. They sum to `num_samples`, and cutting again by the first of
        them gives the same parts.
    """
    if num_samples <= largest:
        return (num_samples,)
    parts = _in_units(num_samples, largest, multiple_of if multiple_of <= largest else 1)
    return parts if parts[-1] >= smallest else _in_units(num_samples, largest, 1)


def _in_units(num_samples: int, largest: int, unit: int) -> tuple[int, ...]:
    num_units = -(-num_samples // unit)
    num_parts = -(-num_units // (largest // unit))
    small, num_larger = divmod(num_units, num_parts)
    parts = [(small + 1) * unit] * num_larger + [small * unit] * (num_parts - num_larger)
    missing = num_units * unit - num_samples
    # One of several larger parts can spare it best.
    parts[num_larger - 1 if num_larger > 1 else -1] -= missing
    return tuple(sorted(parts, reverse=True))


def equal_part(share: int, largest: int, *, multiple_of: int = 1) -> int | None:
    """Return the largest part that a share can be cut into equally.

    Args:
        share: Samples to cut, at least 1.
        largest: The most samples in a part.
        multiple_of: What the part is a multiple of.

    Returns:
        A divisor of `share`; `None` where there is none.
    """
    parts = range(multiple_of, min(share, largest) + 1, multiple_of)
    return next((part for part in reversed(parts) if share % part == 0), None)


def split(
    effective_batch_size: int,
    *,
    world_size: int = 1,
    largest_whole: int = 0,
    largest_accumulating: int = 0,
    objective: Objective = Objective.LARGEST,
    multiple_of: int = 1,
    smallest: int = 2,
    speeds: Sequence[Speed] = (),
) -> Parts:
    """Cut the first rank's share of an effective batch into micro-batches.

    Args:
        effective_batch_size: Samples in each optimizer step, over all ranks; `check_target` has
            seen both.
        world_size: Ranks that share them.
        largest_whole: The largest batch of a step without accumulation; 0 where it does not matter
            because a whole share does not fit.
        largest_accumulating: The largest micro-batch of a step that accumulates, whose gradients
            live beside the activations; 0 where it is not needed.
        objective: What to aim at.
        multiple_of: What micro-batches are to be multiples of, one of them excepted.
        smallest: The fewest samples that a micro-batch should have.
        speeds: What was measured of micro-batches; for `FASTEST` at least one.

    Returns:
        The parts, and why they are as they are.

    Raises:
        UsageError: There are no equal parts where only those are wanted, or no speeds where the
            fastest is.
    """
    share = share_of(effective_batch_size, world_size)
    uneven_ranks = effective_batch_size % world_size
    remarks = []
    if uneven_ranks:
        if objective is Objective.EVEN:
            below = effective_batch_size // world_size * world_size
            raise UsageError(
                f"{effective_batch_size} samples cannot be shared equally by "
                f"{world_size} ranks. The nearest effective batch sizes that can: "
                f"{below} and {below + world_size}."
            )
        remarks.append(
            f"{effective_batch_size} samples cannot be shared equally by "
            f"{world_size} ranks: {_ranks(uneven_ranks, 'take')} {share} and the "
            f"others {share - 1}, each sample weighted alike."
        )
    if objective is Objective.FASTEST:
        if not speeds:
            raise UsageError(
                "Nothing was measured, so memfit does not know what is fastest. A card "
                "that is not here has no real seconds. Plan for the largest "
                "micro-batch, or plan on a device that is here."
            )
        sizes, why = _fastest(
            share,
            largest_whole,
            largest_accumulating,
            functools.partial(cut, share, multiple_of=multiple_of, smallest=smallest),
            speeds,
        )
        remarks.append(why)
    elif share <= largest_whole:
        sizes = (share,)
    elif objective is Objective.EVEN:
        sizes, why_even = _even(share, largest_accumulating, multiple_of)
        remarks += why_even
    else:
        sizes = cut(share, largest_accumulating, multiple_of=multiple_of, smallest=smallest)
    remarks += _uneven(share, sizes, multiple_of)
    speed = share / _seconds(sizes, speeds) if speeds else None
    return Parts(sizes=sizes, samples_per_second=speed, remarks=tuple(remarks))


def smallest_of(
    sizes: tuple[int, ...],
    effective_batch_size: int,
    *,
    world_size: int = 1,
    multiple_of: int = 1,
    smallest: int = 2,
) -> int:
    """Return the fewest samples in any micro-batch of any rank.

    Args:
        sizes: The first rank's micro-batches.
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: Ranks that share them.
        multiple_of: As in `cut`.
        smallest: As in `cut`.
    """
    least_share = effective_batch_size // world_size
    last_rank = cut(least_share, sizes[0], multiple_of=multiple_of, smallest=smallest)
    return min(sizes[-1], last_rank[-1])


def too_small(effective_batch_size: int, world_size: int, largest: int, part: int) -> str:
    """Say which effective batches have no part of a size that does not run.

    Args:
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: Ranks that share them.
        largest: The most samples in a micro-batch.
        part: The size that does not run.
    """
    step = largest * world_size
    below = effective_batch_size // step * step
    near = f"{below} or {below + step}" if below else f"{below + step}"
    return (
        f"An effective batch of {effective_batch_size} cannot be cut into parts "
        f"of at most {largest} without a part of {part}, and the step does not "
        f"run with such a part. Plan for {near}"
    )


def sizes_to_time(largest: int, *, multiple_of: int = 1) -> tuple[int, ...]:
    """Return the micro-batches whose speed decides which is fastest.

    Args:
        largest: The largest micro-batch.
        multiple_of: What they are multiples of.

    Returns:
        The largest, and halves of it, largest first.
    """
    sizes = (largest >> halvings for halvings in range(_NUM_HALVINGS + 1))
    rounded = (size // multiple_of * multiple_of for size in sizes)
    return tuple(dict.fromkeys(size for size in rounded if size))


def _even(share: int, largest: int, multiple_of: int) -> tuple[tuple[int, ...], list[str]]:
    part = equal_part(share, largest, multiple_of=multiple_of)
    near = _nearest_even(share, largest, multiple_of)
    if part is None:
        raise UsageError(
            f"{share} samples cannot be cut into equal parts of at most {largest} "
            f"that are multiples of {multiple_of}. {near} would."
        )
    if part * _FAR_BELOW > largest:
        return (part,) * (share // part), []
    return (part,) * (share // part), [
        (
            f"The equal parts of {share} nearest to {largest} are of size {part}. "
            f"{near} samples can be cut better."
        )
    ]


def _nearest_even(share: int, largest: int, multiple_of: int) -> str:
    """Say which number of samples near a share has large equal parts."""
    unit = multiple_of if multiple_of <= largest else 1
    num_parts = -(-share // (largest // unit * unit))
    part = max(round(share / num_parts / unit) * unit, unit)
    if part > largest:
        part -= unit
    return f"{num_parts * part} ({num_parts} x {part})"


def _uneven(share: int, sizes: tuple[int, ...], multiple_of: int) -> list[str]:
    remarks = []
    largest = sizes[0]
    if sizes[-1] != largest:
        equal = equal_part(share, largest, multiple_of=multiple_of)
        instead = (
            f"equal parts would be {share // equal} x {equal}"
            if equal is not None
            else f"there are no equal parts that are multiples of {multiple_of}"
        )
        remarks.append(
            f"{len(sizes)} steps do not divide {share}, so the parts differ and are weighted by "
            f"their samples; {instead}."
        )
    odd = [size for size in sizes if size % multiple_of]
    if len(odd) > 1:
        remarks.append(
            f"If the parts were multiples of {multiple_of}, the last one would be "
            "too small. So they are not."
        )
    elif odd:
        which = "One part" if len(sizes) > 1 else "The whole batch"
        remarks.append(f"{which}, {odd[0]}, is not a multiple of {multiple_of}.")
    return remarks


def _fastest(
    share: int,
    largest_whole: int,
    largest_accumulating: int,
    cut_by: Callable[[int], tuple[int, ...]],
    speeds: Sequence[Speed],
) -> tuple[tuple[int, ...], str]:
    """Return the parts that take the least time, and by how much they beat the fewest steps."""
    slowest_end = min(speed.batch_size for speed in speeds)
    candidates: list[tuple[int, ...]] = [(share,)] if share <= largest_whole else []
    largest = largest_accumulating
    while largest >= min(slowest_end, largest_accumulating) and largest > 0:
        sizes = cut_by(largest)
        if not candidates or len(sizes) > len(candidates[-1]):
            candidates.append(sizes)
        # The next smaller cut: below the part that this one is made of.
        largest = sizes[0] - 1
    fewest = candidates[0]
    best, best_seconds = fewest, _seconds(fewest, speeds)
    for sizes in candidates[1:]:
        seconds = _seconds(sizes, speeds)
        if seconds < best_seconds * (1 - _TIMING_NOISE):
            best, best_seconds = sizes, seconds
    if best is fewest:
        return best, ("The plan with the fewest micro-batches was the fastest that was measured.")
    gain = _seconds(fewest, speeds) / best_seconds - 1
    return best, (
        f"Micro-batches of {best[0]} train {gain:.0%} faster than the fewest "
        f"micro-batches, of {fewest[0]}."
    )


def _seconds(sizes: tuple[int, ...], speeds: Sequence[Speed]) -> float:
    """Return the seconds of micro-batches; speeds between measured sizes are interpolated."""
    known = sorted({speed.batch_size: speed.samples_per_second for speed in speeds}.items())
    # Parts differ in at most three sizes, however many they are.
    return sum(sizes.count(size) * size / _speed_at(size, known) for size in set(sizes))


def _speed_at(size: int, known: list[tuple[int, float]]) -> float:
    first_size, first_speed = known[0]
    if size <= first_size:
        # A micro-batch smaller than all that were measured takes as long as the smallest of them.
        return first_speed * size / first_size
    for (low, low_speed), (high, high_speed) in itertools.pairwise(known):
        if size <= high:
            return low_speed + (high_speed - low_speed) * (size - low) / (high - low)
    return known[-1][1]


def _ranks(count: int, verb: str) -> str:
    return f"the first rank {verb}s" if count == 1 else f"the first {count} ranks {verb}"
