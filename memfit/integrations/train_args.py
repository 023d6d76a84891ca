"""Reads the arguments of timm's `train.py`, as train.py reads them.

They become the model and the options of a training step. Arguments that do not change the memory of
a step are skipped. Arguments that change the step in a way that memfit has no option for are
refused.

Source: huggingface/pytorch-image-models, train.py (`_parse_args`, `main`): SGD and float32 are the
    defaults, `--amp` is float16 unless `--amp-dtype` says otherwise, and on a GPU the loader has
    one batch that waits on the device (`--no-prefetcher` turns it off).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import shlex
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from memfit.errors import UsageError
from memfit.records import Averaging, Precision
from memfit.units import parse_value

__all__ = ["TrainArguments", "read_train_arguments"]

_SKIPPED_SWITCHES: Final = """
    dataset-download dataset-trust-remote-code pretrained no-resume-opt no-ddp-bb synchronize-step
    sched-on-updates warmup-prefix no-aug resplit bce-sum model-ema-warmup save-images pin-mem
    use-multi-epochs-loader log-wandb bce-loss
    naflex-patchify-channels-first
"""
_SKIPPED: Final = """
    data-dir dataset train-split val-split train-num-samples val-num-samples class-map
    input-img-mode input-key target-key pretrained-path initial-checkpoint resume crop-pct
    interpolation head-init-scale head-init-bias opt-eps momentum weight-decay clip-grad clip-mode
    layer-decay layer-decay-min-scale layer-decay-no-opt-scale sched lr lr-base lr-base-size
    lr-base-scale lr-noise-pct lr-noise-std lr-cycle-mul lr-cycle-decay lr-cycle-limit lr-k-decay
    warmup-lr min-lr epochs epoch-repeats start-epoch decay-epochs warmup-epochs cooldown-epochs
    patience-epochs decay-rate train-crop-mode hflip vflip color-jitter color-jitter-prob
    grayscale-prob gaussian-blur-prob aa aug-repeats bce-target-thresh bce-pos-weight reprob remode
    recount mixup-prob mixup-switch-prob mixup-mode mixup-off-epoch smoothing train-interpolation
    dist-bn model-ema-decay seed worker-seeding log-interval val-interval recovery-interval
    checkpoint-hist output experiment eval-metric tta wandb-project wandb-resume-id
    train-batches-per-epoch train-steps-per-epoch fuser device dr
    distill-loss-weight task-loss-weight kd-distill-type kd-loss-type kd-student-feature-dim
    kd-teacher-feature-dim kd-temperature kd-token-distill-type naflex-loss-scale
    naflex-max-seq-len train-size-random-mix train-size-schedule train-size-schedule-spread
    variable-batch-loss-scale
"""
_SKIPPED_LISTS: Final = (
    "mean std opt-betas lr-noise decay-milestones scale ratio wandb-tags device-modules "
    "naflex-patch-size-probs naflex-patch-sizes naflex-train-seq-lens train-size-probs"
)
_SWITCHES: Final = (
    "amp channels-last grad-checkpointing no-prefetcher model-ema model-ema-force-cpu"
)
_REFUSED_SWITCHES: Final = {
    "torchscript": "a scripted model",
    "fast-norm": "fast norms",
    "jsd-loss": "the Jensen-Shannon loss over splits of a batch",
    "split-bn": "split batch norm",
    "sync-bn": "synchronized batch norm",
    "naflex-loader": "batches of several sizes",
}
_REFUSED: Final = {
    "config": "arguments in a file",
    "torchcompile-mode": "a mode of torch.compile other than the default",
    "kd-model-name": "a teacher",
    "aug-splits": "several splits of each batch",
}
_REFUSED_LISTS: Final = {
    "train-img-sizes": "batches of several sizes",
    "train-batch-sizes": "batches of several sizes",
}
_SHORT: Final = {"batch-size": "-b", "validation-batch-size": "-vb", "workers": "-j"}
_MODEL_ARGUMENTS: Final = {
    "gp": ("global_pool", str),
    "drop_path": ("drop_path_rate", float),
    "drop_block": ("drop_block_rate", float),
    "bn_momentum": ("bn_momentum", float),
    "bn_eps": ("bn_eps", float),
}
_COLOUR_CHANNELS: Final = 3
_INDUCTOR: Final = "inductor"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainArguments:
    """What the arguments of train.py say about a training step.

    Args:
        model: The timm model's name.
        batch_size: Samples in a micro-batch of each process.
        grad_accum_steps: Micro-batches in each optimizer step.
        keywords: The options of the step, as keyword arguments of memfit's functions.
        remarks: What a trial leaves out, in sentences.
    """

    model: str
    batch_size: int
    grad_accum_steps: int
    keywords: tuple[tuple[str, Any], ...]
    remarks: tuple[str, ...]

    @property
    def samples_per_rank(self) -> int:
        """Samples in each optimizer step of one process."""
        return self.batch_size * self.grad_accum_steps

    def samples_per_step(self, given: Any, world_size: int) -> Any:
        """Return the effective batch size that the user gave, or that of these arguments."""
        return self.samples_per_rank * world_size if given is None else given

    def changes(self, batch_size: int, grad_accum_steps: int) -> str:
        """Return the arguments that have to change, or that none has to."""
        now = (self.batch_size, self.grad_accum_steps)
        if now == (batch_size, grad_accum_steps):
            return f"train.py's arguments fit as they are: {_flags(*now)}"
        return f"Change train.py's arguments: {_flags(batch_size, grad_accum_steps)}"


def _flags(batch_size: int, grad_accum_steps: int) -> str:
    return f"--batch-size {batch_size} --grad-accum-steps {grad_accum_steps}"


def read_train_arguments(text: str) -> TrainArguments:
    """Read the arguments of train.py.

    Args:
        text: The arguments, as a shell splits them.

    Raises:
        UsageError: train.py has no such argument, a value is not valid, or memfit has no option for
            what an argument does.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--train-args cannot be split into words: {error}.") from None
    parser = _parser()
    read, unknown = parser.parse_known_args(words)
    if unknown:
        raise UsageError(_no_such(unknown[0], parser.known))
    for name, what in {**_REFUSED_SWITCHES, **_REFUSED, **_REFUSED_LISTS}.items():
        if getattr(read, name.replace("-", "_")):
            raise UsageError(
                f"--{name} is {what}, and memfit has no such option. Rehearse the command instead: "
                "memfit rehearse --gpu NAME -- python train.py ..."
            )
    return TrainArguments(
        model=read.model,
        batch_size=read.batch_size,
        grad_accum_steps=max(1, read.grad_accum_steps),
        keywords=tuple(_keywords(read).items()),
        remarks=tuple(_remarks(read)),
    )


class _Parser(argparse.ArgumentParser):
    """Raises memfit's error in place of ending the process."""

    def __init__(self) -> None:
        super().__init__(prog="train.py", add_help=False)
        self.known: list[str] = []

    def flag(self, name: str, **options: Any) -> None:
        """Add an argument by its name without dashes."""
        self.known.append(f"--{name}")
        short = (_SHORT[name],) if name in _SHORT else ()
        self.add_argument(*short, f"--{name}", **options)

    def error(self, message: str) -> NoReturn:
        """Raise the message of argparse.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"--train-args: {message}.")


def _parser() -> _Parser:
    parser = _Parser()
    parser.add_argument("data", nargs="?")
    for name in (*_SKIPPED_SWITCHES.split(), *_REFUSED_SWITCHES, *_SWITCHES.split()):
        parser.flag(name, action="store_true")
    for name in (*_SKIPPED.split(), *_REFUSED):
        parser.flag(name)
    for name in (*_SKIPPED_LISTS.split(), *_REFUSED_LISTS):
        parser.flag(name, nargs="+")
    _add_read(parser)
    return parser


def _add_read(parser: _Parser) -> None:
    """Add the arguments whose values are read, beside the switches."""
    parser.flag("model", default="resnet50")
    parser.flag("torchcompile", nargs="?", const=_INDUCTOR)
    parser.flag("opt", default="sgd")
    parser.flag("amp-dtype", default="float16", choices=("float16", "bfloat16"))
    parser.flag("model-dtype", choices=("float32", "float16", "bfloat16"))
    parser.flag("batch-size", type=int, default=128)
    parser.flag("grad-accum-steps", type=int, default=1)
    for name in ("num-classes", "img-size", "in-chans", "validation-batch-size", "workers"):
        parser.flag(name, type=int)
    parser.flag("input-size", type=int, nargs=3)
    for name in ("drop", "mixup", "cutmix"):
        parser.flag(name, type=float, default=0.0)
    parser.flag("drop-connect", type=float)
    parser.flag("cutmix-minmax", type=float, nargs="+")
    for name, (_, kind) in _MODEL_ARGUMENTS.items():
        parser.flag(name.replace("_", "-"), type=kind)
    for name in ("model-kwargs", "opt-kwargs"):
        parser.flag(name, nargs="*", default=[])


def _no_such(word: str, known: Sequence[str]) -> str:
    if not word.startswith("-"):
        return f"train.py takes one folder of data, and {word!r} is one more word."
    near = difflib.get_close_matches(word.partition("=")[0], known, n=1)
    nearest = f"; the nearest is {near[0]}" if near else ""
    return f"timm's train.py has no argument {word}{nearest}."


def _keywords(read: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the step, as keyword arguments.

    Raises:
        UsageError: memfit has no option for a value.
    """
    channels = read.in_chans or (read.input_size[0] if read.input_size else _COLOUR_CHANNELS)
    size = read.input_size[1:] if read.input_size else [read.img_size] * 2
    arguments = {
        name: getattr(read, flag)
        for flag, (name, _) in _MODEL_ARGUMENTS.items()
        if getattr(read, flag) is not None
    }
    if read.drop:
        arguments["drop_rate"] = read.drop
    if channels != _COLOUR_CHANNELS:
        arguments["in_chans"] = channels
    ema = None
    if read.model_ema:
        ema = Averaging.CPU if read.model_ema_force_cpu else Averaging.DEVICE
    return {
        "precision": _precision(read),
        "optimizer": read.opt,
        "image_size": None if size[0] is None else tuple(size),
        "num_classes": read.num_classes,
        "channels_last": read.channels_last,
        "grad_checkpointing": read.grad_checkpointing,
        "model_kwargs": {**arguments, **_pairs("--model-kwargs", read.model_kwargs)},
        "ema": ema,
        "prefetch": 0 if read.no_prefetcher or (read.device or "").startswith("cpu") else 1,
        "fused": _is_fused(read),
        "compile": _is_compiled(read),
    }


def _is_compiled(read: argparse.Namespace) -> bool:
    if read.torchcompile not in (None, _INDUCTOR):
        raise UsageError(
            f"memfit compiles with {_INDUCTOR} only, not with {read.torchcompile!r}. Rehearse the "
            "command instead: memfit rehearse --gpu NAME -- python train.py ..."
        )
    return read.torchcompile is not None


def _precision(read: argparse.Namespace) -> Precision:
    if read.model_dtype == "float16":
        raise UsageError(
            "memfit has no trials of a model in float16. train.py advises against it: give "
            "--model-dtype bfloat16."
        )
    if read.amp:
        if read.model_dtype == "bfloat16":
            raise UsageError("train.py takes --amp with a model in float32 only.")
        return Precision.AMP_BF16 if read.amp_dtype == "bfloat16" else Precision.AMP_FP16
    return Precision.BF16 if read.model_dtype == "bfloat16" else Precision.FP32


def _is_fused(read: argparse.Namespace) -> bool:
    given = _pairs("--opt-kwargs", read.opt_kwargs)
    other = sorted(given.keys() - {"fused"})
    if other:
        raise UsageError(
            f"memfit reads fused of --opt-kwargs only, not {other[0]}. Rehearse the command "
            "instead: memfit rehearse --gpu NAME -- python train.py ..."
        )
    return bool(given.get("fused", False))


def _pairs(flag: str, words: Sequence[str]) -> dict[str, Any]:
    """Read KEY=VALUE words, as timm's `ParseKwargs` does."""
    found = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f"{flag} takes KEY=VALUE, not {word!r}.")
        found[key] = parse_value(text)
    return found


def _remarks(read: argparse.Namespace) -> list[str]:
    """Return what a trial leaves out."""
    said = []
    if read.mixup > 0 or read.cutmix > 0 or read.cutmix_minmax:
        said.append(
            "Mixup and cutmix are not in the trials: each sample then has a target of one number "
            "for each class."
        )
    if read.drop_connect is not None:
        said.append("train.py does not use --drop-connect: give --drop-path.")
    validation = read.validation_batch_size or read.batch_size
    if validation > read.batch_size:
        said.append(
            f"Validation in batches of {validation} is not in the trials: ask memfit probe "
            "--evaluate in-training."
        )
    return said
