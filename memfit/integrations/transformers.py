"""A plan as `TrainingArguments` of Hugging Face transformers.

Source: huggingface/transformers, src/transformers/training_args.py:
    `per_device_train_batch_size` is a device's micro-batch. `gradient_accumulation_steps` is the
    number of micro-batches in a step. `max_grad_norm` is 1.0 unless it is set. A CPU is used if
    `use_cpu` is set.
    src/transformers/trainer.py, `get_batch_samples`: all micro-batches of a step are loaded to the
    device before the first of them runs.
"""

from __future__ import annotations

from memfit.integrations.equal import comment, equal_parts, headline
from memfit.integrations.step_lines import brought, is_on_cpu, model_lines, refuse_on_cpu
from memfit.records import Plan, Precision

__all__ = ["lines"]

_PRECISIONS = {Precision.AMP_BF16: "bf16=True", Precision.AMP_FP16: "fp16=True"}
_FUSED_OPTIMIZERS = {"adamw": "adamw_torch_fused"}
_OPTIMIZERS = {
    "adamw": "adamw_torch",
    "sgd": "sgd",
    "adafactor": "adafactor",
    "bnbadamw8bit": "adamw_bnb_8bit",
    "bitsandbytes.AdamW8bit": "adamw_bnb_8bit",
    "bitsandbytes.PagedAdamW8bit": "paged_adamw_8bit",
    "bitsandbytes.Lion8bit": "lion_8bit",
    "bitsandbytes.PagedLion8bit": "paged_lion_8bit",
    "torchao.AdamW8bit": "adamw_torch_8bit",
    "torchao.AdamW4bit": "adamw_torch_4bit",
}


def lines(plan: Plan) -> str:
    """Return the arguments that carry the plan out.

    They expect `model` if the plan converts it.

    Raises:
        UsageError: transformers does not support such parts or such a precision.
    """
    refuse_on_cpu(plan, "transformers", Precision.AMP_FP16)
    parts = equal_parts(plan, "transformers")
    options = plan.options
    comments = brought(plan, optimizer=None)
    arguments = [
        'output_dir="OUTPUT"',
        f"per_device_train_batch_size={parts.micro_batch_size}",
        f"gradient_accumulation_steps={parts.accumulation_steps}",
        "max_grad_norm=1.0",
    ]
    comments.append("transformers clips to max_grad_norm=1.0 by default; 0 turns clipping off.")
    if parts.accumulation_steps > 1:
        comments.append(
            f"transformers holds the inputs of all {parts.accumulation_steps} "
            "micro-batches of a step on the device at once. Leave room for "
            f"{parts.accumulation_steps - 1} more than the plan's trials had."
        )
    if options.precision in _PRECISIONS:
        arguments.append(_PRECISIONS[options.precision])
    optimizers = _FUSED_OPTIMIZERS if options.fused else _OPTIMIZERS
    if options.optimizer in optimizers:
        arguments.append(f'optim="{optimizers[options.optimizer]}"')
    elif options.optimizer is not None:
        comments.append(
            f"The plan is for the optimizer {options.optimizer}"
            f"{' with fused=True' if options.fused else ''}: give it to Trainer as optimizers."
        )
    if is_on_cpu(plan):
        arguments.append("use_cpu=True")
    if options.channels_last:
        comments.append("Images of a batch are in torch.channels_last too: your data_collator.")
    if plan.world_size > 1:
        comments.append(f"Start it with: torchrun --nproc-per-node={plan.world_size} SCRIPT.")
    # The argument gradient_checkpointing needs a model of transformers. These lines set what the
    # plan's trials had, for a model of timm in any module.
    model = model_lines(plan)
    is_converted = any("torch." in line for line in model)
    written = [
        comment(headline(plan, parts), *parts.comments, *comments),
        *(("import torch",) if is_converted else ()),
        "from transformers import TrainingArguments",
        "",
        *model,
        "arguments = TrainingArguments(",
        *(f"    {argument}," for argument in arguments),
        ")",
    ]
    return "\n".join(written) + "\n"
