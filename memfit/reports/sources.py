"""The words that reports use for the source of a figure."""

from __future__ import annotations

from collections.abc import Iterable

from memfit.records import Source, Sweep, SweepRow, Trial

__all__ = ["about", "how_it_was_had", "no_gpu_took_part", "said_of_kernels", "said_of_sweep"]

_HOW = {
    Source.MEASURED: "Measured",
    Source.REHEARSED: "Rehearsed, not measured",
    Source.SIMULATED: "Simulated, not measured",
}
_WHO_RAN = {
    Source.REHEARSED: "torch's own CUDA software ran, and no GPU took part",
    Source.SIMULATED: "no GPU took part",
}
_OTHER_KERNELS = (
    "AMD's cards are simulated with the scratch memory of NVIDIA's kernels: the largest batch "
    "size is near, not exact."
)


def how_it_was_had(source: Source) -> str:
    """Return a source as the beginning of a sentence."""
    return _HOW[source]


def no_gpu_took_part(source: Source) -> str:
    """Return a sentence that says that no GPU was used, for figures of absent cards."""
    return f"{_HOW[source]}: {_WHO_RAN[source]}."


def about(number: int, trials: Iterable[Trial | SweepRow]) -> str:
    """Return a batch size as text, with `about` before it if trials say that it is not exact.

    Args:
        number: The batch size.
        trials: The trials that it comes from, or its row in a sweep.
    """
    return f"about {number}" if any(trial.is_approximate for trial in trials) else str(number)


_QUICK = (
    "cuDNN was not asked for the workspaces of convolutions, so the recommended batch size of a "
    "convolutional model can be a tenth too large."
)
"""What a report says of a quick sweep."""


def said_of_sweep(sweep: Sweep) -> tuple[str, ...]:
    """Return the sentences on how the figures of a sweep were had.

    Args:
        sweep: The sweep.
    """
    return (*said_of_kernels(sweep.rows), *((_QUICK,) if sweep.is_quick else ()))


def said_of_kernels(trials: Iterable[Trial | SweepRow]) -> tuple[str, ...]:
    """Return a sentence if the trials used another vendor's kernels, else nothing.

    Args:
        trials: The trials of a result, or the rows of a sweep.
    """
    return (_OTHER_KERNELS,) if any(trial.is_approximate for trial in trials) else ()
