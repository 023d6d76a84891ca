"""A plan as a fastai `Learner`.

Source: fastai/fastai, fastai/callback/training.py: `GradientAccumulation(n_acc)` counts samples,
    not batches. It weighs each batch by its share of `n_acc`, and steps after `n_acc` samples. So
    the batch size must divide `n_acc` to make steps of exactly that size. Samples left over when
    `fit` ends stay in the gradients. fastai/callback/fp16.py: `MixedPrecision` autocasts on CUDA
    only.
"""

from __future__ import annotations

from memfit.errors import UsageError
from memfit.integrations.equal import comment, equal_parts, headline
from memfit.integrations.step_lines import (
    brought,
    is_on_cpu,
    model_lines,
    package_of,
    refuse_on_cpu,
)
from memfit.records import Plan, Precision, StepOptions

__all__ = ["lines"]

_PRECISIONS = {Precision.AMP_BF16: ".to_bf16()", Precision.AMP_FP16: ".to_fp16()"}


def lines(plan: Plan) -> str:
    """Return the learner that carries the plan out.

    It expects `train`, `valid`, `model` and `loss_fn`.

    Raises:
        UsageError: fastai does not support such parts or such a precision.
    """
    refuse_on_cpu(plan, "fastai", Precision.AMP_BF16, Precision.AMP_FP16)
    if plan.options.precision is Precision.BF16:
        raise UsageError(
            "fastai cannot train weights in bf16: its record of the loss takes float32 only. Plan "
            "with precision amp-bf16, or emit pytorch."
        )
    parts = equal_parts(plan, "fastai")
    options = plan.options
    imported, function = _optimizer(options)
    comments = [
        *brought(plan, optimizer=None),
        (
            "n_acc counts samples. Samples left over in an epoch go into the next "
            "step. Samples left over at the end of fit are dropped. fastai itself "
            "does not drop them."
        ),
    ]
    if plan.world_size > 1:
        comments.append(
            f"Start it with: accelerate launch --num_processes {plan.world_size} SCRIPT, and fit "
            "inside learn.distrib_ctx(). bs and n_acc are each process's."
        )
    if options.channels_last:
        comments.append("Images in a batch follow the model: ChannelsLast() below.")
    is_named = options.optimizer is not None
    imports = ["DataLoaders", "GradientAccumulation", "Learner"]
    imports += ["Callback"] + ["OptimWrapper"] * is_named
    model = model_lines(plan)
    callbacks = ["GradientAccumulation(n_acc=N)", "DropLeftover()"]
    callbacks[0] = f"GradientAccumulation(n_acc={parts.samples_per_rank})"
    layout = []
    if options.channels_last:
        callbacks.append("ChannelsLast()")
        layout = [
            "",
            "class ChannelsLast(Callback):",
            "    def before_batch(self):",
            "        images = (x.to(memory_format=torch.channels_last) for x in self.xb)",
            "        self.learn.xb = tuple(images)",
            "",
        ]
    device = ', device="cpu"' if is_on_cpu(plan) else ""
    written = [
        comment(headline(plan, parts), *parts.comments, *comments),
        *(("from functools import partial", "") if is_named else ()),
        *(("import torch",) if model else ()),
        f"from fastai.vision.all import {', '.join(sorted(imports))}",
        *imported,
        "",
        "",
        "class DropLeftover(Callback):",
        "    def after_fit(self):",
        "        self.model.zero_grad()",
        "",
        *layout,
        "",
        *model,
        f"dls = DataLoaders.from_dsets(train, valid, bs={parts.micro_batch_size}{device})",
        *function,
        f"callbacks = [{', '.join(callbacks)}]",
        (
            f"learn = Learner(dls, model, loss_func=loss_fn, cbs=callbacks"
            f"{', opt_func=opt_func' if is_named else ''}){_PRECISIONS.get(options.precision, '')}"
        ),
    ]
    return "\n".join(written) + "\n"


def _optimizer(options: StepOptions) -> tuple[list[str], list[str]]:
    """Return the line that imports the plan's optimizer, and the line that tells fastai of it."""
    name = options.optimizer
    if name is None:
        return [], []
    package = package_of(name)
    if package is not None:
        made = name.removeprefix(f"{package}.")
        return [f"from {package}.optim import {made}"], [
            f"opt_func = partial(OptimWrapper, opt={made})"
        ]
    fused = ", fused=True" if options.fused else ""
    return ["from timm.optim import create_optimizer_v2"], [
        f'opt_func = partial(OptimWrapper, opt=partial(create_optimizer_v2, opt="{name}"{fused}))'
    ]
