"""A plan as a loop with Hugging Face Accelerate.

Source: huggingface/accelerate, Accelerator(gradient_accumulation_steps=...): the number of batches
    of a process's loader before each optimizer step. `backward` divides every loss by that number.
    Its fp16 needs a GPU.
"""

from __future__ import annotations

from memfit.integrations.equal import comment, equal_parts, headline
from memfit.integrations.step_lines import brought, is_on_cpu, model_lines, refuse_on_cpu
from memfit.records import Plan, Precision

__all__ = ["PRECISIONS", "lines"]

PRECISIONS = {Precision.AMP_BF16: "bf16", Precision.AMP_FP16: "fp16"}
"""What `mixed_precision` is called in Accelerate."""


def lines(plan: Plan) -> str:
    """Return the loop that carries the plan out.

    It expects `model`, `optimizer`, `loss_fn` and `dataset`.

    Raises:
        UsageError: Accelerate does not support such parts or such a precision.
    """
    refuse_on_cpu(plan, "Accelerate", Precision.AMP_FP16)
    parts = equal_parts(plan, "Accelerate")
    comments = [
        (
            "If the last window has fewer batches, Accelerate still divides by "
            "gradient_accumulation_steps."
        )
    ]
    if plan.world_size > 1:
        comments.append(
            f"Start it with: accelerate launch --num_processes {plan.world_size} SCRIPT. The batch "
            "size is each process's."
        )
    arguments = [
        f"gradient_accumulation_steps={parts.accumulation_steps}",
        f'mixed_precision="{PRECISIONS.get(plan.options.precision, "no")}"',
        *(("cpu=True",) if is_on_cpu(plan) else ()),
    ]
    model = model_lines(plan)
    convert = []
    if plan.options.precision is Precision.BF16:
        convert.append("        x = x.to(torch.bfloat16)")
    if plan.options.channels_last:
        convert.append("        x = x.to(memory_format=torch.channels_last)")
    written = [
        comment(headline(plan, parts), *parts.comments, *brought(plan), *comments),
        *(("import torch",) if model or convert else ()),
        "from accelerate import Accelerator",
        "from torch.utils.data import DataLoader",
        "",
        *model,
        f"accelerator = Accelerator({', '.join(arguments)})",
        (
            f"loader = DataLoader(dataset, batch_size={parts.micro_batch_size}, shuffle=True, "
            "drop_last=True)"
        ),
        "model, optimizer, loader = accelerator.prepare(model, optimizer, loader)",
        "for x, y in loader:",
        "    with accelerator.accumulate(model):",
        *convert,
        "        accelerator.backward(loss_fn(model(x), y))",
        "        optimizer.step()",
        "        optimizer.zero_grad()",
    ]
    return "\n".join(written) + "\n"
