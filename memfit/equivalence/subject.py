"""What is verified: the parts of a step, a batch of different samples, and its cuts."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from memfit.equivalence.gradients import CheckSetup
from memfit.equivalence.mixing import NUM_SAMPLES
from memfit.equivalence.randomness import Draws, seed_all
from memfit.equivalence.samples import Samples, made_distinct, moved_off_zero
from memfit.equivalence.splits import bounded, splits_of
from memfit.records import Precision
from memfit.step.training_step import StepParts, TrainingStep

__all__ = ["CPU", "Subject"]

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is verified.

    Args:
        step: The step.
        parts: Its parts, on the CPU.
        whole: The effective batch.
        smaller: The same batch with smaller images; `None` if there are none that the model takes.
        micro_batch_size: Samples in each micro-batch.
        accumulation_steps: Micro-batches in the effective batch.
        samples: The most samples that any comparison runs on; `None` if the user did not say.
        num_jittered: Samples that were copies of others and were changed.
        num_moved: Parameters that were moved off zero.
    """

    step: TrainingStep
    parts: StepParts
    whole: Samples
    smaller: Samples | None
    micro_batch_size: int
    accumulation_steps: int
    samples: int | None
    num_jittered: int
    num_moved: int

    @classmethod
    def of(
        cls,
        step: TrainingStep,
        micro_batch_size: int,
        accumulation_steps: int,
        samples: int | None,
    ) -> Subject:
        """Build the parts of a step and a batch of samples that all differ."""
        seed_all()
        # Weights keep their type; the precision of training is applied in its own check.
        unrounded = dataclasses.replace(step.options, precision=Precision.FP32)
        parts = dataclasses.replace(step, options=unrounded).parts(CPU)
        if isinstance(parts.loss, nn.Module):
            parts.loss.to(CPU)
        enough = max(micro_batch_size * accumulation_steps, NUM_SAMPLES)
        whole = Samples(
            batch=parts.place(parts.batch_of(enough)),
            layout=parts.layout_of(enough),
            split=parts.split,
        )
        whole, num_jittered = made_distinct(whole)
        smaller = step.smaller_images(parts.model, whole.batch)
        return cls(
            step=step,
            parts=parts,
            whole=whole,
            smaller=None if smaller is None else whole.changed(lambda _batch: smaller),
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
            samples=samples,
            num_jittered=num_jittered,
            num_moved=moved_off_zero(parts.model),
        )

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.parts.model

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The model, and the loss if it is a module."""
        loss = self.parts.loss
        return (self.model, *((loss,) if isinstance(loss, nn.Module) else ()))

    @property
    def effective_batch_size(self) -> int:
        """Samples in the effective batch."""
        return self.micro_batch_size * self.accumulation_steps

    def setup(
        self,
        whole: Samples,
        samples: int | None,
        *,
        device: torch.device,
        precision: Precision | None,
        held_fixed: bool = False,
    ) -> tuple[CheckSetup, tuple[tuple[int, ...], ...]]:
        """Return a check of at most some samples of a batch, and the cuts of these samples."""
        size, count = bounded(self.micro_batch_size, self.accumulation_steps, samples)
        setup = CheckSetup(
            model=self.model,
            loss=self.parts.loss,
            samples=whole.first(size * count),
            device=device,
            precision=precision,
            draws=Draws(self.model, size * count, held_fixed=held_fixed),
        )
        return setup, splits_of(size, count)

    @property
    def training_cuts(self) -> tuple[tuple[int, ...], ...]:
        """The cuts of the batch for the check in the precision of training."""
        return splits_of(*bounded(self.micro_batch_size, self.accumulation_steps, self.samples))
