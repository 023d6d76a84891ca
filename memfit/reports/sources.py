"""The words that reports use for the source of a figure."""

from __future__ import annotations

from memfit.records import Source

__all__ = ["how_it_was_had", "no_gpu_took_part"]

_HOW = {
    Source.MEASURED: "Measured",
    Source.REHEARSED: "Rehearsed, not measured",
    Source.SIMULATED: "Simulated, not measured",
}
_WHO_RAN = {
    Source.REHEARSED: "torch's own CUDA software ran, and no GPU took part",
    Source.SIMULATED: "no GPU took part",
}


def how_it_was_had(source: Source) -> str:
    """Return a source as the beginning of a sentence."""
    return _HOW[source]


def no_gpu_took_part(source: Source) -> str:
    """Return a sentence that says that no GPU was used, for figures of absent cards."""
    return f"{_HOW[source]}: {_WHO_RAN[source]}."
