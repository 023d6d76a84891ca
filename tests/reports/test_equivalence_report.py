"""Tests of a verification's report, made from invented records."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console

from memfit.records import (
    BufferDrift,
    Equivalence,
    GradientCheck,
    GradientFault,
    LoopFault,
    LoopWindow,
    LossTerm,
    LossWeighting,
    MixesIn,
    MixingLayer,
    ParameterDifference,
    Precision,
    StepOptions,
    Verdict,
)
from memfit.reports.equivalence import render

SMALL = ParameterDifference(
    name="head.weight", relative_error=2e-15, bound=1e-13, scale=1.0, scale_bound=1e-14
)
LARGE = dataclasses.replace(SMALL, relative_error=0.5, scale=0.75)
PASSED = GradientCheck(
    precision="fp64",
    device="cpu",
    reference=(32,),
    cut=(8, 8, 8, 8),
    unit_roundoff=2.0**-53,
    num_summands=1000,
    num_parameters=3,
    num_differing=0,
    worst=(SMALL,),
    worst_relative_error=2e-15,
)
FAILED = dataclasses.replace(PASSED, num_differing=3, worst=(LARGE,), worst_relative_error=0.5)
MIXER = MixingLayer(
    name="bn1", type_name="BatchNorm2d", mixes_in=MixesIn.FORWARD, moved=0.25, stops_in_eval=True
)
EQUAL = Equivalence(
    subject="vit_tiny",
    verdict=Verdict.EQUAL,
    micro_batch_size=8,
    accumulation_steps=4,
    options=StepOptions(precision=Precision.FP32),
    device="cpu",
    weighting=LossWeighting.SAMPLES,
    checks=(PASSED,),
    seconds=1.25,
    torch_version="2.8.0",
)
DIFFERS = dataclasses.replace(EQUAL, verdict=Verdict.DIFFERS, checks=(FAILED,))


def text(result: Equivalence, **changes: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(render(dataclasses.replace(result, **changes)))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def test_an_equal_model_s_report_in_full() -> None:
    """It has the verdict in one line, the comparisons and the parameters."""
    assert text(EQUAL) == (
        "equal: vit_tiny at 4 x 8, to 2.0e-15 in float64\n"
        "\n"
        "precision  device  compared  with         largest error  differ\n"
        "fp64       cpu     4 x 8     the full 32  2.0e-15        0 of 3\n"
        "\n"
        "furthest apart in fp64, 4 x 8:\n"
        "parameter    error    bound    scale\n"
        "head.weight  2.0e-15  1.0e-13  1\n"
        "and 2 more\n"
        "\n"
        "The loss averages over samples. Multiply the loss of each micro-batch by n_i / N.\n"
        "Measured on cpu in 1.2 s, torch 2.8.0."
    )


def test_the_list_is_of_the_comparison_that_the_verdict_speaks_of() -> None:
    """Of several that failed, it is the one with the largest error."""
    larger = dataclasses.replace(LARGE, name="head.weight", relative_error=0.9)
    worse = dataclasses.replace(FAILED, cut=(9, 23), worst=(larger,), worst_relative_error=0.9)
    report = text(DIFFERS, checks=(FAILED, worse))
    assert "gradients off by up to 9.0e-01" in report
    assert "furthest apart in fp64, 9 + 23:" in report
    assert "head.weight" in report


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"mixing_layers": (MIXER,)},
            "differs: vit_tiny at 4 x 8, 1 layer mixes samples; gradients off",
        ),
        (
            {"mixing_layers": (dataclasses.replace(MIXER, name="loss", mixes_in=MixesIn.LOSS),)},
            "the loss mixes samples; gradients off by up to 5.0e-01",
        ),
        (
            {"faults": (GradientFault.CARRIES_STATE,), "carried": ("queue",)},
            "a forward pass changes queue for the next; gradients off",
        ),
        (
            {"faults": (GradientFault.DEPENDS_ON_ORDER, GradientFault.ADDS_DIFFERENT_MEANS)},
            "the order of the samples matters and the loss adds means over different counts; grad",
        ),
        (
            {"faults": (GradientFault.DEPENDS_ON_ORDER,), "checks": (PASSED,), "order_error": 0.25},
            "the order of the samples matters; another order moves gradients by 2.5e-01",
        ),
        ({"detaching": ("neck",)}, "neck detaches; gradients off"),
        ({}, "differs: vit_tiny at 4 x 8, gradients off by up to 5.0e-01"),
        ({"checks": (PASSED,)}, "the model's gradients add up, the loop's do not"),
    ],
)
def test_the_verdict_names_the_cause(changes: dict[str, Any], line: str) -> None:
    """The cause is in the one line of the verdict, which may wrap."""
    assert line in " ".join(text(DIFFERS, **changes).splitlines()[:2])


@pytest.mark.parametrize(
    "fault",
    [
        fault
        for fault in GradientFault
        if fault not in (GradientFault.MIXES_SAMPLES, GradientFault.DETACHES)
    ],
)
def test_every_fault_has_its_sentence(fault: GradientFault) -> None:
    """The sentence says what the fault is and what to do."""
    with_it, without = text(DIFFERS, faults=(fault,)), text(DIFFERS)
    assert len(with_it.splitlines()) > len(without.splitlines())


def test_the_counts_that_the_losses_average_over_are_said() -> None:
    """Each loss has an expression of the batch."""
    term = LossTerm(
        name="ce", weighting=LossWeighting.TARGETS, counts="(batch['labels'] != -100).sum()"
    )
    one = text(EQUAL, weighting=LossWeighting.TARGETS, terms=(term,)).replace("\n", " ")
    assert "What counts is (batch['labels'] != -100).sum()." in one
    other = LossTerm(name="l1", weighting=LossWeighting.SAMPLES)
    both = text(EQUAL, weighting=LossWeighting.SEVERAL, terms=(term, other)).replace("\n", " ")
    assert "ce: (batch['labels'] != -100).sum(), l1: samples." in both
    summed = text(
        DIFFERS,
        weighting=LossWeighting.SEVERAL,
        terms=(term, other),
        faults=(GradientFault.ADDS_DIFFERENT_MEANS,),
    ).replace("\n", " ")
    assert "Return the losses as a dictionary" in summed
    assert "  l1: samples" in summed


def test_a_comparison_of_a_part_of_the_samples_is_said() -> None:
    """The table shows other parts than were asked for, so a sentence says why."""
    part = dataclasses.replace(PASSED, cut=(4, 4), reference=(8,))
    whole = dataclasses.replace(PASSED, precision="amp-bf16", cut=(8,) * 4, reference=(32,))
    said = text(EQUAL, checks=(part, whole)).replace("\n", " ")
    assert "In fp64, 8 of the 32 samples were compared, to save time" in said
    assert "samples=32 (--samples 32) compares all." in said
    assert "compares all" not in text(EQUAL, checks=(whole,))


def test_float32_that_stands_in_is_said() -> None:
    """The headline says it and gives the reason."""
    check = dataclasses.replace(PASSED, precision="fp32", worst_relative_error=3e-7)
    report = text(EQUAL, checks=(check,), single_precision="RuntimeError: no kernel")
    first = report.splitlines()[0]
    assert first.endswith("to 3.0e-07 in float32, because float64 cannot be had")
    assert "cannot run in float64 (RuntimeError: no kernel)" in report.replace("\n", " ")


def test_a_screen_holds_the_report_of_a_large_model() -> None:
    """The number of layers that mix and of parameters that differ does not matter."""
    many = dataclasses.replace(FAILED, worst=(LARGE,) * 20, num_parameters=900, num_differing=900)
    report = text(DIFFERS, checks=(many,) * 4, mixing_layers=(MIXER,) * 120)
    assert len(report.splitlines()) < 40
    assert "and 895 more" in report
    assert "and 112 more" in report


def test_what_was_frozen_is_said() -> None:
    """The verdict and the table both say it."""
    report = text(EQUAL, mixing_layers=(dataclasses.replace(MIXER, frozen=True),))
    assert report.startswith("equal: vit_tiny at 4 x 8, 1 layer frozen, to 2.0e-15 in float64")
    assert "--freeze-bn" not in report


def test_what_to_do_about_layers_that_mix() -> None:
    """Freezing is advised only where it helps."""
    report = text(DIFFERS, mixing_layers=(MIXER,), alternatives=("vit_gn",))
    assert "--freeze-bn" in report
    assert "timm has these variants, which memfit did not check: vit_gn." in report
    stubborn = text(DIFFERS, mixing_layers=(dataclasses.replace(MIXER, stops_in_eval=False),))
    assert "--freeze-bn" not in stubborn
    assert "Evaluation mode does not stop" in stubborn
    loss = MixingLayer(name="loss", type_name="clip", mixes_in=MixesIn.LOSS, moved=1.0)
    assert "do not cut the batch" in text(DIFFERS, mixing_layers=(loss,))


def test_a_detached_model_s_verdict() -> None:
    """The verdict names what is cut off."""
    report = text(
        EQUAL, verdict=Verdict.DETACHED, detaching=("neck",), unreached=("a", "b", "c", "d", "e")
    )
    assert report.startswith("detached: vit_tiny at 4 x 8, neck cuts off 5 parameters")


def test_a_difference_of_single_samples_alone_is_pointed_out() -> None:
    """Then the model is not the cause."""
    single = dataclasses.replace(FAILED, cut=(2, 1, 1))
    assert "one sample differ" in text(DIFFERS, checks=(PASSED, single))


def test_everything_that_was_done_to_the_run_is_said() -> None:
    """No change to the run is left out."""
    report = text(
        EQUAL,
        checks=(dataclasses.replace(PASSED, message="The full batch of 32 does not fit."),),
        buffers=(BufferDrift(name="bn.running_mean", relative_change=0.5),),
        num_drifting_buffers=2,
        unreached=("mask",),
        replayed=("drop",),
        switched_off=("noise",),
        held_fixed=("mask",),
        changes_batch=True,
        num_jittered_samples=3,
        num_moved_parameters=1,
    )
    for said in (
        "The full batch of 32 does not fit.",
        "2 buffers end up elsewhere",
        "No gradient reaches mask.",
        "replayed sample by sample in drop.",
        "switched off in noise.",
        "Random draws in mask had one value",
        "changes the batch in place",
        "3 samples were copies",
        "1 parameter at zero",
    ):
        assert said in report


@pytest.mark.parametrize("fault", LoopFault)
def test_every_fault_of_a_loop_has_its_sentence(fault: LoopFault) -> None:
    """After it come the weights that were found and the right ones."""
    window = LoopWindow(
        cut=(8, 4),
        weights=(0.5, 0.5),
        expected_weights=(2 / 3, 1 / 3),
        residual=0.0,
        relative_error=0.3,
        num_steps=1,
    )
    report = text(DIFFERS, loop=(window,), loop_faults=(fault,))
    assert "The loop " in report
    assert "8 + 4: weights 0.5, 0.5; right are 0.6667, 0.3333" in report


@pytest.mark.parametrize(
    ("moved", "line"),
    [(0.4, "(GradCache)"), (0.0, "depend on the model's outputs, such as the boxes")],
)
def test_what_fits_a_loss_that_mixes(moved: float, line: str) -> None:
    """If some weights are exact, but change with the outputs, gathering outputs does not help."""
    mixer = MixingLayer(name="loss", type_name="f", mixes_in=MixesIn.LOSS, moved=moved)
    assert line in " ".join(text(DIFFERS, mixing_layers=(mixer,)).split())


def test_gradients_in_noise_are_no_proof() -> None:
    """The report says about how many parameters a precision shows nothing."""
    noisy = dataclasses.replace(SMALL, relative_error=0.4, bound=0.9, in_noise=True)
    check = dataclasses.replace(
        PASSED, precision="amp-bf16", worst=(noisy,), num_in_noise=2, noise=0.4
    )
    said = " ".join(text(EQUAL, checks=(PASSED, check)).split())
    assert "In amp-bf16, 2 gradients of 3 are in noise" in said
    assert "does (4.0e-01). amp-bf16 shows nothing about them." in said
    assert "rests on float64" in said
