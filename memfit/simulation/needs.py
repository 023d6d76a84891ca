"""Memory whose size is known only for a card and a batch size.

Most of a step's requests grow by the same bytes with every sample, on every card. Some do not. The
scratch memory of a reduction depends on the card's multiprocessors, and a BLAS workspace on its
architecture. Such a request is recorded as a `Need`. Its size is found when the step is replayed.
This module does not use torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Final

from memfit.cards import Gpu
from memfit.records import Event

__all__ = ["Need", "NeedEvent", "nearby_batch_size"]

# A rough schedule knows batch sizes that are so many times the one before.
_STEP: Final = 1.25
# Where a line would have left its course.
_FAR: Final = 1000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """How many bytes a kernel asks for, as a rule and what the rule depends on.

    Args:
        rule: A function from a card and the numbers to bytes. 0 means that nothing is asked for.
        numbers: What the size depends on besides the card, such as the sizes of a tensor. Each
            grows evenly with the batch size, but the bytes may not.
        is_slow: The rule takes milliseconds and not microseconds.
        is_even: The bytes grow evenly with the batch size, if one dimension of each tensor does.
        others: A function from a card and the numbers to what is asked for in place of the bytes if
            they find no room, one after another; `None` if nothing is.
    """

    rule: Callable[..., int]
    numbers: tuple[int, ...] = ()
    is_slow: bool = False
    is_even: bool = False
    others: Callable[..., Iterator[int]] | None = dataclasses.field(default=None, compare=False)

    def on(self, gpu: Gpu) -> int:
        """Return the bytes that are asked for on a card."""
        return self.rule(gpu, *self.numbers)

    def instead_on(self, gpu: Gpu) -> Iterator[int]:
        """Yield what is asked for on a card if the bytes find no room."""
        if self.others is not None:
            yield from self.others(gpu, *self.numbers)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NeedEvent(Event):
    """An allocation whose size is found when it is replayed.

    Args:
        need: The need at the batch size of the recording.
        growth: How much each number of the need grows with every further sample.
    """

    need: Need
    growth: tuple[float, ...] = ()

    def grown_like(self, other: Event, samples: int) -> NeedEvent:
        """Return this event with the growth that a second recording shows.

        Args:
            other: The same event at another batch size.
            samples: How many samples more `other` has.
        """
        assert isinstance(other, NeedEvent)
        pairs = zip(self.need.numbers, other.need.numbers, strict=True)
        growth = tuple((theirs - own) / samples for own, theirs in pairs)
        return dataclasses.replace(self, growth=growth)

    def need_after(self, samples: int) -> Need:
        """Return the need with so many samples more than in the recording."""
        need = self.need
        numbers = self._numbers_after(samples)
        return Need(
            rule=need.rule,
            numbers=numbers,
            is_slow=need.is_slow,
            is_even=need.is_even,
            others=need.others,
        )

    def bytes_after(self, samples: int, gpu: Gpu) -> int:
        """Return what is asked for on a card, with so many samples more than in the recording."""
        # Without a `Need` in between, because a search asks a hundred thousand times.
        return self.need.rule(gpu, *self._numbers_after(samples))

    def line_on(self, gpu: Gpu) -> tuple[int, int] | None:
        """Return the bytes in the recording and what each further sample adds, if it is even."""
        if not self.need.is_even:
            return None
        recorded, slope = self.bytes_after(0, gpu), self.bytes_after(1, gpu)
        slope -= recorded
        is_line = self.bytes_after(_FAR, gpu) == recorded + _FAR * slope
        return (recorded, slope) if is_line else None

    def _numbers_after(self, samples: int) -> tuple[int, ...]:
        if not any(self.growth):
            return self.need.numbers
        pairs = zip(self.need.numbers, self.growth, strict=True)
        return tuple([int(number + grown * samples) for number, grown in pairs])


def nearby_batch_size(batch_size: int) -> int:
    """Return one of the few batch sizes that stand for all others in a rough schedule."""
    number = round(math.log(batch_size) / math.log(_STEP))
    return max(1, round(_STEP**number))
