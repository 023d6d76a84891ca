"""The options of a plan's training step, as lines of Python and as sentences.

A plan fits because its step was tried with these options. For each option there are three ways. The
emitted code sets it, a sentence tells the user that their own object must have it, or the plan is
refused.
"""

from __future__ import annotations

from memfit.errors import UsageError
from memfit.records import Averaging, Plan, Precision

__all__ = [
    "are_images_channels_last",
    "brought",
    "is_on_cpu",
    "model_lines",
    "package_of",
    "refuse_on_cpu",
]


def is_on_cpu(plan: Plan) -> bool:
    """Whether the plan is for a CPU."""
    return plan.device.lower().startswith("cpu")


def are_images_channels_last(plan: Plan) -> bool:
    """Whether images have to be in `torch.channels_last`, as the model is."""
    return plan.options.channels_last


def brought(plan: Plan, *, model: str = "model", optimizer: str | None = "optimizer") -> list[str]:
    """Return what the plan expects of the user's own objects.

    Args:
        plan: The plan.
        model: The model in the emitted code, as an expression of Python.
        optimizer: The optimizer's name in it; `None` if the code creates the optimizer.

    Returns:
        Sentences; empty if any objects will do.
    """
    options = plan.options
    said = []
    arguments = dict(options.model_kwargs)
    if options.num_classes is not None:
        arguments["num_classes"] = options.num_classes
    if arguments:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        said.append(f"{model} is timm.create_model({plan.subject!r}, {given}).")
    if options.image_size is not None:
        height, width = options.image_size
        said.append(
            f"The plan is for images of {height} x {width} pixels; a model of a fixed size is made "
            f"with img_size=({height}, {width})."
        )
    if options.optimizer is not None and optimizer is not None:
        package = package_of(options.optimizer) or "timm"
        said.append(
            f"{optimizer} is {_made_by(options.optimizer, model)} with your learning rate (import "
            f"{package}.optim): another may need more memory."
        )
    return [*said, *_habits(plan, model, makes_optimizer=optimizer is None)]


def package_of(optimizer: str | None) -> str | None:
    """Return the package of an optimizer that is named by it, such as `torchao.AdamW8bit`."""
    package, dot, _ = (optimizer or "").partition(".")
    return package if dot else None


def _made_by(optimizer: str, model: str) -> str:
    package = package_of(optimizer)
    if package is None:
        return f"timm.optim.create_optimizer_v2({model}, opt={optimizer!r})"
    name = optimizer.removeprefix(f"{package}.")
    return f"{package}.optim.{name}({model}.parameters())"


def _habits(plan: Plan, model: str, *, makes_optimizer: bool) -> list[str]:
    """Return sentences on what the loop of the plan does beside the step.

    Args:
        plan: The plan.
        model: The model's name in the emitted code.
        makes_optimizer: The emitted code makes the optimizer.
    """
    options = plan.options
    said = []
    if options.frozen:
        patterns = " and ".join(options.frozen)
        said.append(
            f"The plan is for a partly frozen {model}: before the optimizer is made, set "
            f"requires_grad to False for the parameters named {patterns}."
        )
    if options.fused and not makes_optimizer:
        said.append("The optimizer is made with fused=True.")
    if options.ema is not None:
        where = "on the model's device" if options.ema is Averaging.DEVICE else "in host memory"
        said.append(
            f"The plan leaves room for an average of the weights {where}, such as "
            "timm.utils.ModelEmaV3 keeps (import timm.utils). Update it after each step."
        )
    if options.prefetch:
        waiting = "1 more batch" if options.prefetch == 1 else f"{options.prefetch} more batches"
        said.append(f"The plan leaves room for {waiting} on the device, prefetched.")
    if options.keeps_outputs:
        said.append(
            "The plan leaves room for a batch, its outputs and its loss that stay until the next "
            "ones replace them."
        )
    return said


def model_lines(plan: Plan, *, model: str = "model") -> list[str]:
    """Return the lines that prepare a model as it was when the plan was tried.

    Args:
        plan: The plan.
        model: The name of the model, or of a module that contains it, in the emitted code.
    """
    options = plan.options
    lines = []
    if options.grad_checkpointing:
        lines += [
            f"for part in {model}.modules():",
            '    if hasattr(part, "set_grad_checkpointing"):',
            "        part.set_grad_checkpointing()",
        ]
    if options.checkpoint:
        lines += _checkpoint_lines(options.checkpoint, model)
    if options.channels_last:
        lines.append(f"{model}.to(memory_format=torch.channels_last)")
    if options.precision is Precision.BF16:
        lines.append(f"{model}.to(torch.bfloat16)")
    if options.compile:
        # A second size would be compiled for all sizes, with other kernels than in the trials.
        is_one_size = len(set(plan.micro_batch_sizes)) == 1
        lines.append(f"{model}.compile({'' if is_one_size else 'dynamic=False'})")
    return lines


def _checkpoint_lines(blocks: tuple[str, ...], model: str) -> list[str]:
    """Return the lines that recompute some blocks of a model in backward."""
    if any(set(name) & set("*?[") for name in blocks):
        return ["import memfit", f"memfit.checkpoint({model}, {list(blocks)!r})"]
    return [
        "import functools",
        "from torch.utils.checkpoint import checkpoint",
        "recomputed = [",
        *(f'    "{name}",' for name in blocks),
        "]",
        "for name in recomputed:",
        f"    block = {model}.get_submodule(name)",
        "    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)",
    ]


def refuse_on_cpu(plan: Plan, trainer: str, *precisions: Precision) -> None:
    """Refuse a precision that a trainer does not have on a CPU.

    Args:
        plan: The plan.
        trainer: The trainer's name in the error.
        *precisions: The precisions that the trainer has on GPUs only.

    Raises:
        UsageError: The plan is for a CPU and has one of these precisions.
    """
    if is_on_cpu(plan) and plan.options.precision in precisions:
        raise UsageError(
            f"{trainer} has no {plan.options.precision.value} on a CPU, which the plan is for: "
            "plan with precision fp32, or emit pytorch."
        )
