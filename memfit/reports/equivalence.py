"""Shows a verification's result in the terminal."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memfit.records import (
    Equivalence,
    GradientCheck,
    GradientFault,
    LoopFault,
    LossWeighting,
    MixesIn,
    MixingLayer,
    ParameterDifference,
    Verdict,
)
from memfit.reports.equivalence_advice import advice, count_words, first_names
from memfit.reports.tables import plain_table

__all__ = ["cut_words", "render", "verdict_words"]

_NUM_PARAMETERS = 5
_NUM_MIXERS = 8
_ONE_PERCENT = 0.01

_WEIGHTINGS = {
    LossWeighting.SAMPLES: (
        "The loss averages over samples. Multiply the loss of each micro-batch by n_i / N."
    ),
    LossWeighting.TARGETS: (
        "The loss averages over valid targets. Multiply the loss of each "
        "micro-batch by t_i / T, where T is counted over the whole effective "
        "batch first."
    ),
    LossWeighting.SUM: ("The loss is a sum. Add the losses of the micro-batches without weights."),
    LossWeighting.CLASSES: (
        "The loss averages over the weights of classes. Multiply the loss of "
        "each micro-batch by its share of the sum of these weights."
    ),
    LossWeighting.MEASURED: (
        "The weights were measured from the loss's gradients, and no count in the batch gives "
        "them. Return the loss as a sum, divided by a number for the whole batch, and give the "
        "Accumulator weight='sum'."
    ),
}

_HEADLINES = {
    LossWeighting.TARGETS: ", weighted by valid targets",
    LossWeighting.SUM: ", added up as a sum",
    LossWeighting.CLASSES: ", weighted by the weights of classes",
    LossWeighting.SEVERAL: ", with a weight for each loss",
    LossWeighting.MEASURED: ", with the weights that were measured",
}

_SHORT = {
    GradientFault.DEPENDS_ON_ORDER: "the order of the samples matters",
    GradientFault.CARRIES_STATE: "one forward pass changes the next",
    GradientFault.ADDS_DIFFERENT_MEANS: "the loss adds means over different counts",
    GradientFault.DRAWS_NOT_REPLAYED: "random draws belong to the whole batch",
    GradientFault.DOES_NOT_REPEAT: "the same pass does not repeat",
}

_FAULTS = {
    LoopFault.DIVIDED_BY_CONFIGURED_STEPS: (
        "divides by the configured steps, so a short last window counts too "
        "little: divide by the number of micro-batches in the window"
    ),
    LoopFault.DIVIDED_BY_WRONG_COUNT: (
        "divides the mean of each micro-batch by a number that is not the "
        "number of micro-batches in the window"
    ),
    LoopFault.MEAN_OF_MEANS: (
        "averages the means of the micro-batches, so the samples of small ones "
        "count too much: weight each by its samples, n_i / N"
    ),
    LoopFault.MEAN_OF_TARGET_MEANS: (
        "averages the means of the micro-batches, but the loss averages over "
        "targets: weight each by its targets, t_i / T"
    ),
    LoopFault.NOT_DIVIDED: "adds up the micro-batches' means without dividing: the gradient grows "
    "with their number",
    LoopFault.SCALED: "scales every gradient by one factor",
    LoopFault.SKIPPED_MICRO_BATCH: "leaves a micro-batch out",
    LoopFault.MISSING_LAST_WINDOW: "takes no step for a short last window: its samples are lost, "
    "or leak into the next epoch",
    LoopFault.CLIPPED_PER_MICRO_BATCH: "clips after each micro-batch: clip once, before the step",
    LoopFault.STEPPED_TOO_OFTEN: "steps more than once in a window: nothing accumulates",
    LoopFault.GRADIENTS_CARRIED_OVER: "does not zero the gradients after a step",
    LoopFault.UNEXPLAINED: "makes a gradient that no weighting of the micro-batches explains",
}


def render(result: Equivalence) -> RenderableType:
    """Lay out a verification's result.

    Args:
        result: The verification's result.

    Returns:
        An object for `rich.console.Console.print`. It shows the verdict in one line, the
        comparisons, the parameters that differ most, what mixes samples, and what to do about it.
    """
    parts: list[RenderableType] = [_verdict(result), "", _checks(result)]
    worst = _worst_check(result)
    if worst is not None:
        parts += ["", Text(f"furthest apart in {worst.precision}, {cut_words(worst.cut)}:", "dim")]
        parts.append(_parameters(worst))
    if result.mixing_layers:
        parts += ["", _mixers(result)]
    for title, lines in (("", _loop(result)), ("", advice(result)), ("", _notes(result))):
        if lines:
            parts += [title, *(Text(line) for line in lines)]
    return Group(*parts)


def verdict_words(result: Equivalence) -> str:
    """Return the verdict in one line.

    Args:
        result: The verification's result.
    """
    return _verdict(result).plain


def _verdict(result: Equivalence) -> Text:
    what = f": {result.subject} at {result.accumulation_steps} x {result.micro_batch_size}"
    if result.verdict is Verdict.EQUAL:
        frozen = sum(mixer.frozen for mixer in result.mixing_layers)
        how = f", {_counted(frozen, 'layer')} frozen" if frozen else ""
        rests_on, name = ("fp64", "float64")
        if result.single_precision is not None:
            rests_on, name = ("fp32", "float32, because float64 cannot be had")
        error = _number(result.worst_relative_error(rests_on) or 0.0)
        weighted = _HEADLINES.get(result.weighting, "")
        return Text.assemble(
            ("equal", "bold green"), f"{what}{how}, to {error} in {name}{weighted}"
        )
    if result.verdict is Verdict.DETACHED:
        cut_off = _counted(len(result.unreached), "parameter")
        return Text.assemble(
            ("detached", "bold red"), f"{what}, {first_names(result.detaching)} cuts off {cut_off}"
        )
    return Text.assemble(("differs", "bold red"), f"{what}, {_cause(result)}")


def _cause(result: Equivalence) -> str:
    failed = [check for check in result.checks if not check.passed]
    if not failed and not result.faults:
        return "the model's gradients add up, the loop's do not"
    worst = max((check.worst_relative_error for check in failed), default=result.order_error or 0.0)
    off = f"gradients off by up to {_number(worst)}"
    if not failed:
        by_order = GradientFault.DEPENDS_ON_ORDER in result.faults
        off = "the gradients of this batch happen to agree"
        if GradientFault.DOES_NOT_REPEAT in result.faults:
            off = "at random"
        if by_order:
            off = f"another order moves gradients by {_number(worst)}"
    mixing = [mixer for mixer in result.mixing_layers if not mixer.frozen]
    if mixing:
        return f"{_who_mixes(mixing)} samples; {off}"
    if result.detaching:
        return f"{first_names(result.detaching)} detaches; {off}"
    causes = [_SHORT[fault] for fault in result.faults if fault in _SHORT]
    moved = result.carried or result.stateful
    if GradientFault.CARRIES_STATE in result.faults and moved:
        causes = [f"a forward pass changes {first_names(moved)} for the next"]
    return f"{' and '.join(causes)}; {off}" if causes else off


def _who_mixes(mixing: list[MixingLayer]) -> str:
    if any(mixer.mixes_in is MixesIn.LOSS for mixer in mixing):
        return "the loss mixes"
    return f"{_counted(len(mixing), 'layer')} {'mixes' if len(mixing) == 1 else 'mix'}"


def _checks(result: Equivalence) -> Table:
    table = plain_table("precision", "device", "compared", "with", "largest error", "differ")
    for check in result.checks:
        table.add_row(
            check.precision,
            check.device,
            cut_words(check.cut),
            cut_words(check.reference),
            _number(check.worst_relative_error),
            Text(f"{check.num_differing} of {check.num_parameters}",
                 "green" if check.passed else "red"),
        )  # fmt: skip
    return table


def _worst_check(result: Equivalence) -> GradientCheck | None:
    """Return the failed comparison with the largest error; if none failed, the last one.

    The last one is training's.
    """
    with_parameters = [check for check in result.checks if check.worst]
    failed = [check for check in with_parameters if not check.passed]
    if failed:
        return max(failed, key=lambda check: check.worst_relative_error)
    return with_parameters[-1] if with_parameters else None


def _parameters(check: GradientCheck) -> Table:
    table = plain_table("parameter", "error", "bound", "scale", "")
    for difference in check.worst[:_NUM_PARAMETERS]:
        table.add_row(
            difference.name,
            _number(difference.relative_error),
            _number(difference.bound),
            "" if difference.scale is None else f"{difference.scale:.6g}",
            _remark(difference),
        )
    left = check.num_parameters - min(_NUM_PARAMETERS, len(check.worst))
    if left:
        table.add_row(f"and {left} more", "", "", "", "", style="dim")
    return table


def _remark(difference: ParameterDifference) -> Text:
    if difference.differs:
        return Text("differs", "red")
    if difference.in_noise:
        return Text("in noise", "dim")
    return Text("zero, apart from rounding" if difference.vanishes else "", "dim")


def _mixers(result: Equivalence) -> Table:
    table = plain_table("mixes samples", "class", "in", "changes others by", "")
    for mixer in result.mixing_layers[:_NUM_MIXERS]:
        table.add_row(
            mixer.name,
            mixer.type_name,
            mixer.mixes_in.value,
            f"{mixer.moved:.1%}",
            _about_freezing(mixer),
        )
    left = len(result.mixing_layers) - _NUM_MIXERS
    if left > 0:
        table.add_row(f"and {left} more", "", "", "", "", style="dim")
    return table


def _about_freezing(mixer: MixingLayer) -> str:
    if mixer.frozen:
        return "frozen"
    if mixer.stops_in_eval is None:
        return ""
    return "stops in eval mode" if mixer.stops_in_eval else "also in eval mode"


def _loop(result: Equivalence) -> list[str]:
    if not result.loop:
        return []
    lines = [f"The loop {_FAULTS[fault]}." for fault in result.loop_faults]
    for window in result.loop:
        seen = ", ".join(f"{weight:.4g}" for weight in window.weights)
        right = ", ".join(f"{weight:.4g}" for weight in window.expected_weights)
        lines.append(f"  {cut_words(window.cut)}: weights {seen}; right are {right}")
    return lines if result.loop_faults else ["The accumulation loop is right.", *lines]


def _notes(result: Equivalence) -> list[str]:
    notes = [*_about_checks(result), *_weights(result)]
    if result.buffers and result.buffers[0].full is None:
        worst = result.buffers[0]
        notes.append(
            f"{_counted(result.num_drifting_buffers, 'buffer')} end up elsewhere "
            f"than after the full batch, {worst.name} by {worst.relative_change:.2g} "
            "of its norm, because running statistics change once for each "
            "micro-batch."
        )
    if result.unreached and result.verdict is not Verdict.DETACHED:
        notes.append(f"No gradient reaches {first_names(result.unreached)}.")
    if result.replayed:
        notes.append(
            f"Random draws were replayed sample by sample in {first_names(result.replayed)}."
        )
    if result.draws_on_host:
        notes.append(
            "Python or NumPy drew random numbers. Every pass began with the same seed, so that a "
            "number for the whole pass was the same in each."
        )
    if result.held_fixed:
        notes.append(
            f"Random draws in {first_names(result.held_fixed)} had one value for all samples, "
            "because memfit cannot tell which draw belongs to which sample."
        )
    if result.changes_batch:
        notes.append("Forward changes the batch in place, so every pass got its own copy.")
    if result.switched_off:
        notes.append(f"Randomness was switched off in {first_names(result.switched_off)}.")
    if result.num_jittered_samples:
        notes.append(
            f"{_counted(result.num_jittered_samples, 'sample')} were copies of others. memfit "
            "changed them a little, because copies hide layers that mix samples."
        )
    if result.num_moved_parameters:
        notes.append(
            f"{_counted(result.num_moved_parameters, 'parameter')} at zero had other values "
            "during the check, because zeros hide the gradients of other parameters."
        )
    notes.append(f"Measured on {result.device} in {result.seconds:.1f} s, torch "
                 f"{result.torch_version}.")  # fmt: skip
    return notes


def _about_checks(result: Equivalence) -> list[str]:
    notes = [check.message for check in result.checks if check.message is not None][:1]
    asked = result.micro_batch_size * result.accumulation_steps
    partly = [check for check in result.checks if sum(check.reference) < asked]
    if partly:
        precisions = " and ".join(dict.fromkeys(check.precision for check in partly))
        notes.append(
            f"In {precisions}, {max(sum(check.reference) for check in partly)} of the {asked} "
            "samples were compared, to save time: a model that mixes samples mixes these too. "
            f"samples={asked} (--samples {asked}) compares all."
        )
    if result.single_precision is not None:
        notes.append(
            f"The step cannot run in float64 ({result.single_precision}), so float32 stands in, "
            "with a bound of 1e-4."
        )
    noisy = max(result.checks, key=lambda check: check.noise or 0.0, default=None)
    if noisy is not None and noisy.noise is not None:
        notes.append(
            f"In {noisy.precision}, {_counted(noisy.num_in_noise, 'gradient')} of "
            f"{noisy.num_parameters} are in noise: rounding the weights or another order of the "
            "samples moves them as much as cutting the batch does "
            f"({_number(noisy.noise)}). {noisy.precision} shows nothing about them. What is said "
            f"about them rests on {'float64' if result.single_precision is None else 'float32'}."
        )
    if result.used_smaller_images:
        notes.append(
            "Layers that mix decide the verdict, so the float64 comparison used smaller images."
        )
    return notes


def _weights(result: Equivalence) -> list[str]:
    """Return sentences about the weight that each micro-batch's loss needs."""
    if GradientFault.ADDS_DIFFERENT_MEANS in result.faults:
        return []
    instead = []
    if result.off_by_samples is not None:
        instead.append(
            "With the weight n_i / N instead, which is the Accumulator's default, the gradient of "
            f"this batch is off by {_share(result.off_by_samples)}."
        )
    if result.weighting is LossWeighting.SEVERAL:
        of_each = ", ".join(f"{term.name}: {count_words(term)}" for term in result.terms)
        return [f"The losses average over different things: {of_each}.", *instead]
    line = _WEIGHTINGS[result.weighting]
    counts = {term.counts for term in result.terms}
    named = counts.pop() if len(counts) == 1 else None
    return [line if named is None else f"{line} What counts is {named}.", *instead]


def cut_words(cut: tuple[int, ...]) -> str:
    """Return the samples of micro-batches in a few words.

    Args:
        cut: The samples of each micro-batch; one number for the full batch.
    """
    if len(cut) == 1:
        return f"the full {cut[0]}"
    if len(set(cut)) == 1:
        return f"{len(cut)} x {cut[0]}"
    if len(cut) > _NUM_MIXERS:
        return f"{len(cut)} uneven parts of {min(cut)} to {max(cut)}"
    return " + ".join(map(str, cut))


def _number(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else str(value)


def _share(value: float) -> str:
    return f"{value:.0%}" if value >= _ONE_PERCENT else _number(value)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
