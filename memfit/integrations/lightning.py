"""A plan as arguments of a Lightning `Trainer`.

Source: Lightning-AI/pytorch-lightning, Trainer(accumulate_grad_batches=...): batches of the loader
    before each optimizer step; every loss is divided by that number, in a short last window too.
"""

from __future__ import annotations

from memfit.integrations.equal import comment, equal_parts, headline
from memfit.records import Plan, Precision

__all__ = ["lines"]

_PRECISIONS = {
    Precision.FP32: "32-true",
    Precision.AMP_BF16: "bf16-mixed",
    Precision.AMP_FP16: "16-mixed",
    Precision.BF16: "bf16-true",
}


def lines(plan: Plan) -> str:
    """Return the loader and the trainer that carry the plan out."""
    parts = equal_parts(plan, "Lightning")
    head = comment(
        headline(plan, parts),
        *parts.comments,
        "A last window of fewer batches is divided by accumulate_grad_batches all the same: its "
        "gradient is too small unless their number divides the loader's.",
    )
    arguments = [
        f"accumulate_grad_batches={parts.accumulation_steps}",
        f'precision="{_PRECISIONS[plan.options.precision]}"',
    ]
    if plan.world_size > 1:
        arguments += [f"devices={plan.world_size}", 'strategy="ddp"']
    return (
        f"{head}\n"
        "import lightning\n"
        "from torch.utils.data import DataLoader\n\n"
        f"loader = DataLoader(dataset, batch_size={parts.micro_batch_size}, shuffle=True, "
        "drop_last=True)\n"
        f"trainer = lightning.Trainer({', '.join(arguments)})\n"
        "trainer.fit(module, loader)\n"
    )
