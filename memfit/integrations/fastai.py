"""A plan as a fastai `Learner`.

Source: fastai/fastai, fastai/callback/training.py: `GradientAccumulation(n_acc)` counts samples,
    not batches, weighs each batch by its share of `n_acc`, and steps once that many were seen: so
    only a batch size that divides `n_acc` makes steps of that size.
"""

from __future__ import annotations

from memfit.integrations.equal import comment, equal_parts, headline, weights_in_bf16
from memfit.records import Plan, Precision

__all__ = ["lines"]

_PRECISIONS = {Precision.AMP_BF16: ".to_bf16()", Precision.AMP_FP16: ".to_fp16()"}


def lines(plan: Plan) -> str:
    """Return the learner that carries the plan out.

    It expects `train`, `valid`, `model` and `loss_fn`.
    """
    parts = equal_parts(plan, "fastai")
    comments = ["n_acc counts samples; those left over in an epoch are part of the next step."]
    if plan.world_size > 1:
        comments.append(
            f"Start it with: accelerate launch --num_processes {plan.world_size} SCRIPT, and fit "
            "inside learn.distrib_ctx(). bs and n_acc are each process's."
        )
    comments += weights_in_bf16(plan)
    precision = _PRECISIONS.get(plan.options.precision, "")
    return (
        f"{comment(headline(plan, parts), *parts.comments, *comments)}\n"
        "from fastai.vision.all import DataLoaders, GradientAccumulation, Learner\n\n"
        f"dls = DataLoaders.from_dsets(train, valid, bs={parts.micro_batch_size})\n"
        f"accumulate = GradientAccumulation(n_acc={parts.samples_per_rank})\n"
        f"learn = Learner(dls, model, loss_func=loss_fn, cbs=accumulate){precision}\n"
    )
