"""The arguments of timm's train.py are read as train.py reads them."""

from __future__ import annotations

from typing import Any

import pytest

from memfit.errors import UsageError
from memfit.integrations.train_args import read_train_arguments
from memfit.records import Averaging, Precision


def keywords(text: str) -> dict[str, Any]:
    return dict(read_train_arguments(text).keywords)


def test_the_defaults_are_those_of_train_py() -> None:
    """SGD in float32, batches of 128, and one batch that waits on the GPU."""
    read = read_train_arguments("--data-dir /data")
    assert (read.model, read.batch_size, read.grad_accum_steps) == ("resnet50", 128, 1)
    assert {name: value for name, value in read.keywords if value} == {
        "precision": Precision.FP32,
        "optimizer": "sgd",
        "prefetch": 1,
    }
    assert read.remarks == ()
    assert read.samples_per_step(None, 2) == 256
    assert read.samples_per_step(64, 2) == 64
    assert read.changes(128, 1).startswith("train.py's arguments fit as they are")


def test_a_recipe_is_read_whole() -> None:
    """What changes memory becomes an option, and the rest is skipped."""
    read = read_train_arguments(
        "/data --model convnext_base -b 64 --grad-accum-steps 4 --amp --amp-dtype bfloat16 --opt "
        "adamw --opt-kwargs fused=True --opt-betas 0.9 0.95 --lr 1e-3 --sched cosine --model-ema "
        "--model-ema-force-cpu --mixup 0.2 --drop-path 0.1 --drop 0.2 --input-size 1 320 240 "
        "--num-classes 10 --channels-last --grad-checkpointing --torchcompile --no-prefetcher -j 8 "
        "--aa rand-m9-mstd0.5 -vb 256 --model-kwargs ls_init_value=1e-6 conv_mlp=True"
    )
    assert (read.model, read.samples_per_rank) == ("convnext_base", 256)
    assert dict(read.keywords) == {
        "precision": Precision.AMP_BF16,
        "optimizer": "adamw",
        "image_size": (320, 240),
        "num_classes": 10,
        "channels_last": True,
        "grad_checkpointing": True,
        "model_kwargs": {
            "drop_path_rate": 0.1,
            "drop_rate": 0.2,
            "in_chans": 1,
            "ls_init_value": 1e-6,
            "conv_mlp": True,
        },
        "ema": Averaging.CPU,
        "prefetch": 0,
        "fused": True,
        "compile": True,
    }
    assert [remark.split()[0] for remark in read.remarks] == ["Mixup", "Validation"]


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("--amp", Precision.AMP_FP16),
        ("--model-dtype bfloat16", Precision.BF16),
        ("--amp-dtype bfloat16", Precision.FP32),
    ],
)
def test_the_precision_is_train_pys(text: str, precision: Precision) -> None:
    """Without --amp its type does not count."""
    assert keywords(text)["precision"] is precision


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--modle resnet50", "no argument --modle; the nearest is --model"),
        ("/data more", "takes one folder of data, and 'more' is one more word"),
        ("-b many", "invalid int value: 'many'"),
        ("--torchcompile eager", "inductor only, not with 'eager'"),
        ("--torchcompile-mode max-autotune", "a mode of torch.compile .* memfit rehearse"),
        ("--kd-model-name resnet18", "--kd-model-name is a teacher"),
        ("--train-img-sizes 128 224", "batches of several sizes"),
        ("--model-dtype float16", "no trials of a model in float16"),
        ("--amp --model-dtype bfloat16", "--amp with a model in float32 only"),
        ("--opt-kwargs foreach=True", "reads fused of --opt-kwargs only, not foreach"),
        ("--model-kwargs 3", "--model-kwargs takes KEY=VALUE, not '3'"),
        ("--model 'resnet50", "cannot be split into words"),
    ],
)
def test_what_memfit_cannot_try_is_refused_in_a_sentence(text: str, message: str) -> None:
    """The sentence names the argument."""
    with pytest.raises(UsageError, match=message):
        read_train_arguments(text)
