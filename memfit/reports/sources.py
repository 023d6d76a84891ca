"""The words that reports use for the source of a figure."""

from __future__ import annotations

from collections.abc import Iterable

from memfit.cards import catalogue
from memfit.records import Precision, ProbeResult, Source, Sweep, SweepRow, Trial

__all__ = [
    "MORE_MAY_FIT",
    "about",
    "edge_words",
    "how_it_was_had",
    "no_gpu_took_part",
    "said_of_edges",
    "said_of_kernels",
    "said_of_precision",
    "said_of_sweep",
]

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


MORE_MAY_FIT = "more may fit (max_batch_size=, --max-batch-size)"
"""What a report says where a search ended before memory ran out."""


def about(number: int, trials: Iterable[Trial | SweepRow]) -> str:
    """Return a batch size as text, with `about` before it if trials say that it is not exact.

    Args:
        number: The batch size.
        trials: The trials that it comes from, or its row in a sweep.
    """
    return f"about {number}" if any(trial.is_approximate for trial in trials) else str(number)


def edge_words(result: ProbeResult) -> str:
    """Return the largest batch size that fits, with `≥` before it if the search ended there."""
    largest = about(result.max_batch_size, result.trials)
    return largest if result.edge_found else f"≥ {largest}"


def said_of_edges(results: Iterable[ProbeResult]) -> tuple[str, ...]:
    """Return a sentence if the search ended before memory ran out on a card, else nothing.

    Args:
        results: The result of each card.
    """
    if all(result.edge_found for result in results):
        return ()
    return (f"≥: the search ended there, and {MORE_MAY_FIT}.",)


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


def said_of_precision(chosen: Iterable[tuple[str, Precision]]) -> tuple[str, ...]:
    """Return sentences on cards without bf16, else nothing.

    Args:
        chosen: Cards by name, each with the precision of its trials.
    """
    without = {gpu.name for gpu in catalogue() if not gpu.has_bf16}
    pairs = [(card, precision) for card, precision in chosen if card in without]
    fp16 = [card for card, precision in pairs if precision is Precision.AMP_FP16]
    bf16 = [card for card, precision in pairs if precision in (Precision.AMP_BF16, Precision.BF16)]
    said = []
    if fp16:
        said.append(f"{_listed(fp16)} no bf16, so the precision auto is amp-fp16 there.")
    if bf16:
        said.append(f"{_listed(bf16)} no bf16: torch computes it in software, which is slow.")
    return tuple(said)


def _listed(cards: list[str]) -> str:
    *others, last = dict.fromkeys(cards)
    return f"{', '.join(others)} and {last} have" if others else f"{last} has"
