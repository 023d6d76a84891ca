"""A plan as arguments of a Lightning `Trainer`.

Source: Lightning-AI/pytorch-lightning, Trainer(accumulate_grad_batches=...): the number of batches
    of the loader before each optimizer step. Every loss is divided by that number, also in a short
    last window. Its 16-mixed needs a GPU.
"""

from __future__ import annotations

import importlib.util

from memfit.integrations.equal import comment, equal_parts, headline
from memfit.integrations.step_lines import brought, is_on_cpu, model_lines, refuse_on_cpu
from memfit.records import Plan, Precision

__all__ = ["lines"]

_PRECISIONS = {
    Precision.FP32: "32-true",
    Precision.AMP_BF16: "bf16-mixed",
    Precision.AMP_FP16: "16-mixed",
    Precision.BF16: "bf16-true",
}


def lines(plan: Plan) -> str:
    """Return the loader and the trainer that carry the plan out.

    They expect a `LightningModule` named `module`, and `dataset`.

    Raises:
        UsageError: Lightning does not support such parts or such a precision.
    """
    refuse_on_cpu(plan, "Lightning", Precision.AMP_FP16)
    parts = equal_parts(plan, "Lightning")
    # Names of blocks are those inside the module's model.
    name = "module.model" if plan.options.checkpoint else "module"
    model = [line for line in model_lines(plan, model=name) if "bfloat16" not in line]
    comments = [
        *brought(plan, model="module.model", optimizer="What configure_optimizers returns"),
        (
            "If the last window has fewer batches, Lightning still divides by "
            "accumulate_grad_batches, and the gradient is too small. It is right "
            "if this number divides the number of batches."
        ),
    ]
    if plan.options.channels_last:
        comments.append(
            "In training_step, put the images into the same layout: "
            "x.to(memory_format=torch.channels_last)."
        )
    arguments = [
        f"accumulate_grad_batches={parts.accumulation_steps}",
        f'precision="{_PRECISIONS[plan.options.precision]}"',
        *(('accelerator="cpu"',) if is_on_cpu(plan) else ()),
    ]
    if plan.world_size > 1:
        arguments += [f"devices={plan.world_size}", 'strategy="ddp"']
    elif is_on_cpu(plan):
        arguments.append("devices=1")
    written = [
        comment(headline(plan, parts), *parts.comments, *comments),
        _import(),
        *(("import torch",) if plan.options.channels_last else ()),
        "from torch.utils.data import DataLoader",
        "",
        *model,
        (
            f"loader = DataLoader(dataset, batch_size={parts.micro_batch_size}, shuffle=True, "
            "drop_last=True)"
        ),
        f"trainer = lightning.Trainer({', '.join(arguments)})",
        "trainer.fit(module, loader)",
    ]
    return "\n".join(written) + "\n"


def _import() -> str:
    """Return how Lightning is imported: by the name of the package that is installed."""
    has_new_name = importlib.util.find_spec("lightning") is not None
    if has_new_name or importlib.util.find_spec("pytorch_lightning") is None:
        return "import lightning"
    return "import pytorch_lightning as lightning"
