"""A plan as `TrainingArguments` of Hugging Face transformers.

Source: huggingface/transformers, src/transformers/training_args.py:
    `per_device_train_batch_size` is a device's micro-batch, `gradient_accumulation_steps` how many
    make a step.
"""

from __future__ import annotations

from memfit.integrations.equal import comment, equal_parts, headline
from memfit.records import Plan, Precision

__all__ = ["lines"]

_PRECISIONS = {Precision.AMP_BF16: "bf16=True", Precision.AMP_FP16: "fp16=True"}
_OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd", "adafactor": "adafactor"}


def lines(plan: Plan) -> str:
    """Return the arguments that carry the plan out."""
    parts = equal_parts(plan, "transformers")
    options = plan.options
    comments = []
    arguments = [
        'output_dir="OUTPUT"',
        f"per_device_train_batch_size={parts.micro_batch_size}",
        f"gradient_accumulation_steps={parts.accumulation_steps}",
    ]
    if options.precision in _PRECISIONS:
        arguments.append(_PRECISIONS[options.precision])
    if options.precision is Precision.BF16:
        comments.append("The model's own parameters are in bfloat16: model.to(torch.bfloat16).")
    if options.grad_checkpointing:
        arguments.append("gradient_checkpointing=True")
    if options.optimizer in _OPTIMIZERS:
        arguments.append(f'optim="{_OPTIMIZERS[options.optimizer]}"')
    elif options.optimizer is not None:
        comments.append(
            f"The plan is for the optimizer {options.optimizer}: give it to Trainer as optimizers."
        )
    if plan.world_size > 1:
        comments.append(f"Start it with: torchrun --nproc-per-node={plan.world_size} SCRIPT.")
    given = "".join(f"    {argument},\n" for argument in arguments)
    return (
        f"{comment(headline(plan, parts), *parts.comments, *comments)}\n"
        "from transformers import TrainingArguments\n\n"
        f"arguments = TrainingArguments(\n{given})\n"
    )
