"""Says which layer is to blame for a value that another sample, or the cut, has changed.

A layer around others may give them values of another shape, for example a batch that is cut to its
longest sample. Such values cannot be put back before the inner layer sees them. So what the inner
layer then returns is blamed on the layer around it.
"""

from __future__ import annotations

__all__ = ["Blame", "ValuePlace"]

ValuePlace = tuple[str, int, str, int]
"""A layer, the number of its call, input or output, and the index of the tensor."""


class Blame:
    """The layers to blame, in one run of a model."""

    def __init__(self) -> None:
        self._calls: dict[str, int] = {}
        self._others: dict[tuple[str, int], str] = {}

    def of(self, maker: str, place: ValuePlace, *, has_other_shape: bool) -> str:
        """Return the layer to blame for a value.

        Args:
            maker: The layer that made the value.
            place: The value's place. Places must come in the order of the run.
            has_other_shape: The value cannot be compared with that of the other run.
        """
        layer, call, way, _ = place
        if way == "in":
            self._calls[layer] = call
        maker = self._others.get((maker, self._calls.get(maker, 0)), maker)
        if has_other_shape and way == "in":
            self._others[layer, call] = maker
        return maker
