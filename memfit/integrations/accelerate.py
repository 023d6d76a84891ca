"""A plan as a loop with Hugging Face Accelerate.

Source: huggingface/accelerate, Accelerator(gradient_accumulation_steps=...): batches of a process's
    loader before each optimizer step; `backward` divides every loss by that number.
"""

from __future__ import annotations

from memfit.integrations.equal import comment, equal_parts, headline, weights_in_bf16
from memfit.records import Plan, Precision

__all__ = ["lines"]

_PRECISIONS = {Precision.AMP_BF16: "bf16", Precision.AMP_FP16: "fp16"}


def lines(plan: Plan) -> str:
    """Return the loop that carries the plan out.

    It expects `model`, `optimizer`, `loss_fn` and `dataset`.
    """
    parts = equal_parts(plan, "Accelerate")
    comments = [
        "A last window of fewer batches is divided by gradient_accumulation_steps all the same."
    ]
    if plan.world_size > 1:
        comments.append(
            f"Start it with: accelerate launch --num_processes {plan.world_size} SCRIPT. The batch "
            "size is each process's."
        )
    comments += weights_in_bf16(plan)
    precision = _PRECISIONS.get(plan.options.precision, "no")
    return (
        f"{comment(headline(plan, parts), *parts.comments, *comments)}\n"
        "from accelerate import Accelerator\n"
        "from torch.utils.data import DataLoader\n\n"
        f"accelerator = Accelerator(gradient_accumulation_steps={parts.accumulation_steps}, "
        f'mixed_precision="{precision}")\n'
        f"loader = DataLoader(dataset, batch_size={parts.micro_batch_size}, shuffle=True, "
        "drop_last=True)\n"
        "model, optimizer, loader = accelerator.prepare(model, optimizer, loader)\n"
        "for x, y in loader:\n"
        "    with accelerator.accumulate(model):\n"
        "        accelerator.backward(loss_fn(model(x), y))\n"
        "        optimizer.step()\n"
        "        optimizer.zero_grad()\n"
    )
