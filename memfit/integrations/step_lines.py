"""The options of a plan's training step, in lines of Python and in sentences.

A plan fits because its step was tried with these options: what is emitted sets each of them, says
it of an object that the user brings, or is refused.
"""

from __future__ import annotations

from memfit.errors import UsageError
from memfit.records import Plan, Precision

__all__ = ["are_images_channels_last", "brought", "is_on_cpu", "model_lines", "refuse_on_cpu"]


def is_on_cpu(plan: Plan) -> bool:
    """Whether the plan is for a CPU."""
    return plan.device.lower().startswith("cpu")


def are_images_channels_last(plan: Plan) -> bool:
    """Whether images have to be in `torch.channels_last`, as the model is."""
    return plan.options.channels_last


def brought(plan: Plan, *, model: str = "model", optimizer: str | None = "optimizer") -> list[str]:
    """Say of the objects that the user brings what the plan was tried with.

    Args:
        plan: The plan.
        model: What the emitted code calls the model.
        optimizer: What it calls the optimizer; `None` where the code makes it.

    Returns:
        Sentences; none where any such objects will do.
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
        said.append(
            f"{optimizer} is timm.optim.create_optimizer_v2({model}, opt={options.optimizer!r}) "
            "with your learning rate: another may need more memory."
        )
    return said


def model_lines(plan: Plan, *, model: str = "model") -> list[str]:
    """Return the lines that put a model into the state that the plan was tried in.

    Args:
        plan: The plan.
        model: What the emitted code calls the model, or a module that holds it.
    """
    options = plan.options
    lines = []
    if options.grad_checkpointing:
        lines += [
            f"for part in {model}.modules():",
            '    if hasattr(part, "set_grad_checkpointing"):',
            "        part.set_grad_checkpointing()",
        ]
    if options.channels_last:
        lines.append(f"{model}.to(memory_format=torch.channels_last)")
    if options.precision is Precision.BF16:
        lines.append(f"{model}.to(torch.bfloat16)")
    return lines


def refuse_on_cpu(plan: Plan, trainer: str, *precisions: Precision) -> None:
    """Refuse a precision that a trainer does not have on a CPU.

    Args:
        plan: The plan.
        trainer: What the error calls the trainer.
        *precisions: Those that it has on GPUs only.

    Raises:
        UsageError: The plan is for a CPU, in one of them.
    """
    if is_on_cpu(plan) and plan.options.precision in precisions:
        raise UsageError(
            f"{trainer} has no {plan.options.precision.value} on a CPU, which the plan is for: "
            "plan with precision fp32, or emit pytorch."
        )
