"""A plan as a command line of timm's `train.py`.

Source: huggingface/pytorch-image-models, train.py: `--batch-size` is a process's micro-batch, and
    `--grad-accum-steps` is the number of micro-batches in a step.
"""

from __future__ import annotations

import shlex

from memfit.errors import UsageError
from memfit.integrations.equal import comment, equal_parts, headline
from memfit.integrations.step_lines import is_on_cpu, package_of
from memfit.records import Averaging, Plan, Precision, StepOptions

__all__ = ["lines"]

_COLOUR_CHANNELS = 3
_PREFETCHED = 1
_OWN_FLAGS = {
    "bn_eps": "--bn-eps",
    "bn_momentum": "--bn-momentum",
    "drop_block_rate": "--drop-block",
    "drop_path_rate": "--drop-path",
    "drop_rate": "--drop",
    "global_pool": "--gp",
    "in_chans": "--in-chans",
    "num_classes": "--num-classes",
}
"""Arguments of `create_model` that train.py passes by itself: twice given, they would crash it."""


def lines(plan: Plan) -> str:
    """Return the command that carries the plan out.

    Raises:
        UsageError: train.py does not support such parts, or has no flag for an option.
    """
    if plan.options.frozen:
        raise UsageError(
            "timm's train.py has no flag that freezes parameters, and the plan is for a model with "
            f"{' and '.join(plan.options.frozen)} frozen: emit pytorch."
        )
    if "scriptable" in dict(plan.options.model_kwargs):
        raise UsageError(
            "timm's train.py sets the model's argument scriptable itself: plan without it, or emit "
            "pytorch."
        )
    if plan.options.checkpoint:
        raise UsageError("timm's train.py has no flag that recomputes single blocks: emit pytorch.")
    package = package_of(plan.options.optimizer)
    if package is not None:
        raise UsageError(
            f"timm's train.py makes no optimizer of {package} by this name, and the plan is for "
            f"{plan.options.optimizer}: emit pytorch."
        )
    parts = equal_parts(plan, "timm's train.py")
    program = (
        ["python"] if plan.world_size == 1 else ["torchrun", f"--nproc-per-node={plan.world_size}"]
    )
    command = [
        *program,
        "train.py",
        "--data-dir",
        "DATA",
        "--model",
        plan.subject,
        "--batch-size",
        str(parts.micro_batch_size),
        "--grad-accum-steps",
        str(parts.accumulation_steps),
        *(("--device", "cpu") if is_on_cpu(plan) else ()),
        *_options(plan.options),
    ]
    comments = [*parts.comments, *_loader_comments(plan)]
    if plan.options.keeps_outputs:
        comments.append(
            "The plan leaves room for a batch, its outputs and its loss that stay. train.py does "
            "not keep them, so plan without --keep-outputs."
        )
    return f"{comment(headline(plan, parts), *comments)}\n{shlex.join(command)}\n"


def _loader_comments(plan: Plan) -> list[str]:
    """Return a sentence if train.py's loader has another number of batches on the device."""
    if plan.options.prefetch == _PREFETCHED or is_on_cpu(plan):
        return []
    planned = plan.options.prefetch or "none"
    return [
        (
            f"On a GPU, train.py's loader has {_PREFETCHED} batch that waits on the device, and "
            f"the plan has {planned}: plan with --prefetch {_PREFETCHED}, or add --no-prefetcher."
        )
    ]


def _options(options: StepOptions) -> list[str]:
    words = {
        Precision.AMP_BF16: ["--amp", "--amp-dtype", "bfloat16"],
        Precision.AMP_FP16: ["--amp", "--amp-dtype", "float16"],
        Precision.BF16: ["--model-dtype", "bfloat16"],
    }.get(options.precision, [])
    words = [*words]
    words += _habits(options)
    kwargs = dict(options.model_kwargs)
    if options.num_classes is not None:
        kwargs["num_classes"] = options.num_classes
    if options.image_size is not None:
        channels = kwargs.get("in_chans", _COLOUR_CHANNELS)
        words += ["--input-size", str(channels), *map(str, options.image_size)]
    if options.channels_last:
        words.append("--channels-last")
    if options.grad_checkpointing:
        words.append("--grad-checkpointing")
    if options.compile:
        words.append("--torchcompile")
    for name, flag in _OWN_FLAGS.items():
        if name in kwargs:
            words += [flag, str(kwargs.pop(name))]
    if kwargs:
        words += ["--model-kwargs", *(f"{key}={value}" for key, value in kwargs.items())]
    return words


def _habits(options: StepOptions) -> list[str]:
    """Return the flags of the optimizer, and of what the loop does beside the step."""
    words = [] if options.optimizer is None else ["--opt", options.optimizer]
    if options.fused:
        words += ["--opt-kwargs", "fused=True"]
    if options.ema is not None:
        words.append("--model-ema")
    if options.ema is Averaging.CPU:
        words.append("--model-ema-force-cpu")
    return words
