"""What a user can do about a verification's result, in sentences."""

from __future__ import annotations

from memfit.records import Equivalence, GradientFault, LossTerm, LossWeighting, MixesIn

__all__ = ["advice", "count_words", "first_names"]

_EXPLAINED = 1e-4  # in float32: some weights give the whole gradient
_NUM_NAMES = 4

_CAUSES = {
    GradientFault.DEPENDS_ON_ORDER: (
        "Another order of the samples changes the gradient of the full batch, "
        "so it matters where a batch is cut. Keep samples that belong together "
        "in one micro-batch, or make them one sample of the batch (a pair, a "
        "triplet)."
    ),
    GradientFault.CARRIES_STATE: (
        "One forward pass changes something that the next one uses, and "
        "accumulation runs several passes. Make this change after the "
        "optimizer's step (a teacher, a queue), or accept the difference that "
        "is shown here."
    ),
    GradientFault.DRAWS_NOT_REPLAYED: (
        "Random numbers are drawn for the whole batch, and a micro-batch draws "
        "other numbers. So the gradients cannot be compared."
    ),
    GradientFault.DOES_NOT_REPEAT: (
        "The same pass from the same state gives another gradient. Something "
        "outside the model and the loss keeps state, or a kernel is not "
        "deterministic."
    ),
    GradientFault.UNEXPLAINED: "None of memfit's experiments shows the reason.",
}


def advice(result: Equivalence) -> list[str]:
    """Return sentences about what a user can do, one a line.

    Args:
        result: The verification's result.
    """
    lines = []
    mixing = [mixer for mixer in result.mixing_layers if not mixer.frozen]
    layers = [mixer for mixer in mixing if mixer.mixes_in is MixesIn.FORWARD]
    if layers and all(mixer.stops_in_eval for mixer in layers):
        lines.append(
            "Freeze the layers that mix (.eval()), and check that with "
            "--freeze-bn. Or use larger micro-batches. Or accept the difference "
            "that is shown here."
        )
    elif layers and all(mixer.stops_in_eval is None for mixer in layers):
        lines.append(
            "Compute it for each sample alone, or accept the difference that is shown here."
        )
    elif layers:
        lines.append(
            "Evaluation mode does not stop all of the mixing. Use normalisation "
            "within each sample, or accept the difference that is shown here."
        )
    if result.alternatives:
        variants = first_names(result.alternatives)
        lines.append(f"timm has these variants, which memfit did not check: {variants}.")
    lines += [_CAUSES[fault] for fault in result.faults if fault in _CAUSES]
    if GradientFault.ADDS_DIFFERENT_MEANS in result.faults:
        lines.append(
            "The loss is one number that adds means over different counts, so no "
            "single weight of a micro-batch is right. Return the losses as a "
            "dictionary, and give the Accumulator a weight for each. With these "
            "weights the gradients are exact:"
        )
        lines += [f"  {term.name}: {count_words(term)}" for term in result.terms]
    losses = [mixer for mixer in mixing if mixer.mixes_in is MixesIn.LOSS]
    if any(mixer.moved <= _EXPLAINED for mixer in losses):
        lines.append(
            "The weights of micro-batches in this loss depend on the model's outputs, such as the "
            "boxes that a detector samples, or the hardest samples. So no count of the batch gives "
            "them. Divide by a number that the batch decides, or accept the difference."
        )
    elif losses:
        lines.append(
            "A loss over pairs of samples needs the whole batch at once. Gather "
            "the outputs of all micro-batches before the loss (GradCache), or do "
            "not cut the batch."
        )
    if _only_single_samples_differ(result):
        lines.append(
            "Only cuts with a micro-batch of one sample differ, because a kernel treats a single "
            "sample differently. Avoid such cuts. (Batch normalisation on the CPU does so in torch "
            "2.15; see docs/equivalence.md.)"
        )
    return lines


def _only_single_samples_differ(result: Equivalence) -> bool:
    failed = [check for check in result.checks if not check.passed]
    passed = [check for check in result.checks if check.passed and 1 not in check.cut]
    return bool(failed) and bool(passed) and all(1 in check.cut for check in failed)


def count_words(term: LossTerm) -> str:
    """Return what a loss averages over: an expression of the batch, or a word."""
    if term.counts is not None:
        return term.counts
    return "samples" if term.weighting is LossWeighting.SAMPLES else term.weighting.value


def first_names(names: tuple[str, ...]) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(names[:_NUM_NAMES])
    return shown if len(names) <= _NUM_NAMES else f"{shown} and {len(names) - _NUM_NAMES} more"
