"""The printed lines for each trainer carry the plan out, or say that they cannot."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from accumulation.parts import GradientRecorder, plan_of, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it
from torch.utils.data import TensorDataset

from memfit.cli.plan import _TRAINERS
from memfit.errors import UsageError
from memfit.integrations import TRAINERS, lines_for
from memfit.records import Plan, Precision, StepOptions
from memfit.records.steps import Averaging

EQUAL_ONLY = ("timm", "lightning", "accelerate", "transformers", "fastai")


def with_options(plan: Plan, **options: Any) -> Plan:
    return dataclasses.replace(plan, options=StepOptions(accumulate=True, **options))


def numbers(text: str, trainer: str) -> tuple[int, int]:
    """Read the micro-batch and the samples of a rank's step from the emitted text."""
    patterns = {
        "timm": (r"--batch-size (\d+)", r"--grad-accum-steps (\d+)"),
        "lightning": (r"batch_size=(\d+)", r"accumulate_grad_batches=(\d+)"),
        "accelerate": (r"batch_size=(\d+)", r"gradient_accumulation_steps=(\d+)"),
        "transformers": (
            r"per_device_train_batch_size=(\d+)",
            r"gradient_accumulation_steps=(\d+)",
        ),
        "fastai": (r"bs=(\d+)", r"n_acc=(\d+)"),
    }[trainer]
    found = [re.findall(pattern, text) for pattern in patterns]
    assert [len(each) for each in found] == [1, 1], text
    micro, steps = (int(each[0]) for each in found)
    return micro, steps if trainer == "fastai" else micro * steps


@given(st.integers(1, 400), st.integers(1, 80), st.integers(1, 4), st.sampled_from(EQUAL_ONLY))
def test_the_effective_batch_is_never_changed_in_silence(
    samples: int, micro: int, ranks: int, trainer: str
) -> None:
    """The emitted numbers multiply to the plan's effective batch, or it is refused."""
    plan = plan_of(max(samples, ranks), micro, world_size=ranks)
    try:
        text = lines_for(plan, trainer)
    except UsageError as error:
        assert not plan.is_even
        assert "equal" in str(error)
        return
    emitted, step = numbers(text, trainer)
    assert step * ranks == plan.effective_batch_size
    assert emitted <= plan.micro_batch_size
    assert step % emitted == 0
    assert ("equal parts only" in text) is (not plan.is_even)


def test_the_commands_are_those_of_the_command_line() -> None:
    """Every trainer that the command line knows has its lines."""
    assert tuple(TRAINERS) == _TRAINERS


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (
            plan_of(10, 4, world_size=4),
            "10 samples cannot be shared equally by 4 ranks. Plan for 8 or",
        ),
        (plan_of(61, 30), "61 samples have no equal parts near 21: plan for 60, or emit pytorch"),
        (
            plan_of(100, 60, multiple_of=8),
            "100 samples have no equal parts near 56: plan for 96, or emit pytorch",
        ),
    ],
)
def test_plans_without_equal_parts_are_refused(plan: Plan, says: str) -> None:
    """The message has the nearest plan with equal parts."""
    for trainer in EQUAL_ONLY:
        with pytest.raises(UsageError, match=says):
            lines_for(plan, trainer)


def test_timm_gets_its_own_flags() -> None:
    """They cover all of the step's options, and the ranks."""
    plan = with_options(
        plan_of(256, 64, world_size=2),
        precision=Precision.AMP_BF16,
        optimizer="lamb",
        image_size=(320, 240),
        num_classes=10,
        channels_last=True,
        grad_checkpointing=True,
        model_kwargs=(("drop_path_rate", 0.1), ("in_chans", 1), ("act_layer", "gelu")),
    )
    assert lines_for(plan, "timm") == (
        "# 256 = 2 x 64 x 2 ranks, measured for cpu in amp-bf16.\n"
        "torchrun --nproc-per-node=2 train.py --data-dir DATA --model net --batch-size 64 "
        "--grad-accum-steps 2 --device cpu --amp --amp-dtype bfloat16 --opt lamb "
        "--input-size 1 320 240 --channels-last --grad-checkpointing --drop-path 0.1 "
        "--in-chans 1 --num-classes 10 --model-kwargs act_layer=gelu\n"
    )


PRECISIONS = {
    Precision.FP32: {"lightning": "32-true", "accelerate": '"no"'},
    Precision.AMP_BF16: {
        "timm": "--amp-dtype bfloat16",
        "lightning": "bf16-mixed",
        "accelerate": '"bf16"',
        "transformers": "bf16=True",
        "fastai": ".to_bf16()",
    },
    Precision.AMP_FP16: {
        "timm": "--amp-dtype float16",
        "lightning": "16-mixed",
        "accelerate": '"fp16"',
        "transformers": "fp16=True",
        "fastai": ".to_fp16()",
    },
    Precision.BF16: {
        "timm": "--model-dtype bfloat16",
        "lightning": "bf16-true",
        "accelerate": "model.to(torch.bfloat16)",
        "transformers": "model.to(torch.bfloat16)",
    },
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_each_trainer_is_told_the_precision_and_its_code_compiles(
    precision: Precision, ranks: int
) -> None:
    """It is in the trainer's words; for several ranks the text says how to start them."""
    plan = dataclasses.replace(
        with_options(
            plan_of(64, 16, world_size=ranks),
            precision=precision,
            optimizer="lamb",
            grad_checkpointing=True,
        ),
        device="NVIDIA L4",
    )
    for trainer in EQUAL_ONLY:
        if (trainer, precision) == ("fastai", Precision.BF16):
            continue  # refused
        text = lines_for(plan, trainer)
        assert PRECISIONS[precision].get(trainer, "") in text
        if trainer != "timm":
            compile(text, trainer, "exec")
        assert ("2" in re.findall(r"(?:processes |node=|devices=)(\d)", text)) is (ranks == 2)
    assert "lamb" in lines_for(plan, "transformers")
    assert "part.set_grad_checkpointing()" in lines_for(plan, "transformers")
    adamw = with_options(plan, precision=precision, optimizer="adamw")
    assert 'optim="adamw_torch"' in lines_for(adamw, "transformers")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("micro", [16, 25])
def test_pytorchs_loops_run_as_they_are(precision: Precision, micro: int) -> None:
    """Both loops train on every batch, and take the same first step."""
    plan = with_options(plan_of(64, micro), precision=precision)
    text = lines_for(plan, "pytorch")
    assert text.startswith("# 64 = ")
    gradients = []
    loader, by_accumulator, by_hand = re.split(r"(?=# With memfit|# Or by hand)", text)
    for loop in (by_accumulator, by_hand):
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        if precision is Precision.BF16:
            model.to(torch.bfloat16)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen = GradientRecorder(optimizer)
        names = {
            "model": model,
            "optimizer": optimizer,
            "loss_fn": F.cross_entropy,
            "dataset": TensorDataset(torch.randn(100, 5), torch.randint(3, (100,))),
        }
        if precision is Precision.BF16 and loop is by_accumulator:
            # A batch in host memory is converted as the trials' were.
            assert 'precision="bf16"' in loop
        exec(compile(loader + loop, "emitted", "exec"), names)  # noqa: S102 - that is the test
        assert len(seen.steps) == 2
        gradients.append(seen.steps[0])
    tolerance = 1e-5 if precision is Precision.FP32 else 0.05
    assert relative_error(*gradients) < tolerance


def test_pytorchs_loops_for_ranks_count_over_all_of_them() -> None:
    """They synchronise in the last micro-batch; weights fit gradients averaged over ranks."""
    text = lines_for(plan_of(64, 16, world_size=2), "pytorch")
    compile(text, "emitted", "exec")
    assert "batch_size=32, sampler=sampler" in text
    assert "weight = len(x_i) / total * 2" in text
    assert "with contextlib.nullcontext() if index == len(parts) - 1 else model.no_sync():" in text
    uneven = lines_for(plan_of(10, 2, world_size=4), "pytorch")
    compile(uneven, "emitted", "exec")
    assert "batch_size=3 - (distributed.get_rank() >= 2)" in uneven
    multiple = lines_for(plan_of(100, 60, multiple_of=8), "pytorch")
    assert "memfit.Accumulator(model, optimizer, 56, loss=loss_fn, multiple_of=8)" in multiple


def test_names_in_comments_are_python_that_can_be_imported() -> None:
    """A comment that makes an optimizer says what to import, and names the model as code does."""
    options = {"precision": Precision.FP32, "optimizer": "adamw", "ema": Averaging.DEVICE}
    for ranks, trainer, model in ((1, "pytorch", "model"), (2, "pytorch", "model.module")):
        text = lines_for(with_options(plan_of(8, 4, world_size=ranks), **options), trainer)
        said = " ".join(text.replace("\n# ", " ").split())
        (call,) = re.findall(r"timm\.optim\.create_optimizer_v2\(.*?\)", said)
        compile(call, "comment", "eval")
        assert f"({model}, " in call
        assert "(import timm.optim)" in said
        assert "(import timm.utils)" in said
    text = lines_for(with_options(plan_of(8, 4), **options), "lightning")
    assert "create_optimizer_v2(module.model, opt='adamw')" in text.replace("\n# ", " ")


HABITS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "ema": (Averaging.CPU, "average of the weights in host memory", ("--model-ema-force-cpu",)),
    "frozen": (("stem.*", "blocks.0.*"), "the parameters named stem.* and blocks.0.*", ()),
    "prefetch": (1, "room for 1 more batch on the device", ()),
    "fused": (True, "made with fused=True", ("--opt-kwargs fused=True",)),
    "keeps_outputs": (True, "its outputs and its loss that stay", ()),
}


@pytest.mark.parametrize("option", HABITS)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_a_loop_does_beside_the_step_is_carried_or_refused(option: str, trainer: str) -> None:
    """Each option is a flag, an argument or a sentence. train.py cannot freeze parameters."""
    value, sentence, flags = HABITS[option]
    plan = dataclasses.replace(
        with_options(plan_of(8, 4), precision=Precision.FP32, optimizer="adamw", **{option: value}),
        device="NVIDIA L4",
    )
    if (trainer, option) == ("timm", "frozen"):
        with pytest.raises(UsageError, match="no flag that freezes parameters"):
            lines_for(plan, trainer)
        return
    text = lines_for(plan, trainer)
    said = " ".join(text.replace("\n# ", " ").split())
    if trainer == "timm":
        assert all(flag in text for flag in flags)
        assert ("--no-prefetcher" in text) is (option != "prefetch")
        assert ("plan without --keep-outputs" in said) is (option == "keeps_outputs")
    elif (trainer, option) == ("transformers", "fused"):
        assert 'optim="adamw_torch_fused"' in text
    elif (trainer, option) == ("fastai", "fused"):
        assert 'create_optimizer_v2, opt="adamw", fused=True)' in text
    else:
        assert sentence in said
