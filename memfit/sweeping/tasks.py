"""One task of a sweep: a training step on all cards. Any process can run it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import memfit
from memfit._torch_private import dispatched, plainly
from memfit.api.asking import Answer, Asked
from memfit.backends import Backend, with_precision
from memfit.backends.simulated import SimulatedBackend
from memfit.cards import find_gpu
from memfit.errors import MemfitError
from memfit.planning import run_search
from memfit.records import Precision, ProbeResult, StepOptions, SweepRow, Trial
from memfit.rehearsal.engines import engine_for_several, source_of
from memfit.simulation.tracing.flops import flops_of_call
from memfit.simulation.tracing.model_facts import ModelFacts
from memfit.simulation.tracing.outputs import outputs
from memfit.step.calling import call_model
from memfit.step.timm_models import import_timm
from memfit.step.training_step import TrainingStep
from memfit.sweeping.selection import family_of

__all__ = ["SweepTask", "facts_of", "first_line", "versions"]

# Batch norm may refuse a single sample.
_COUNTED_SAMPLES = 2


def versions() -> dict[str, str]:
    """Return the versions that decide a sweep's figures, by package."""
    return {
        "memfit": memfit.__version__,
        "torch": torch.__version__,
        "timm": import_timm().__version__,
    }


def facts_of(step: TrainingStep) -> ModelFacts:
    """Build a model without weights, and count, where no card's trace has done it.

    Args:
        step: The training step.

    Raises:
        UsageError: timm cannot build the model.
    """
    # Each card chooses its own precision later, and the counts are the same in all of them.
    counted = dataclasses.replace(step.options, precision=Precision.FP32)
    prepared = dataclasses.replace(step, options=counted).prepare(torch.device("meta"))
    model = prepared.model
    return ModelFacts.of(model, forward_flops=_forward_flops(model, prepared.make_batch))


def _forward_flops(model: nn.Module, make_batch: Callable[[int], Any]) -> int | None:
    """Return the operations of one sample's forward pass, as torch's `FlopCounterMode` has them.

    torch's mode also counts for each module, and takes batch norm apart. That takes most of its
    time, and changes no sum.
    """
    num_flops = 0

    def count(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal num_flops
        with plainly():
            result = outputs(func, args, kwargs)
        num_flops += flops_of_call(func, args, kwargs, result)
        return result

    # Some models need values in their forward pass. Their operations are not counted.
    with contextlib.suppress(Exception), torch.no_grad():
        inputs, _ = make_batch(_COUNTED_SAMPLES)
        inputs = inputs.to(next(model.parameters()).dtype)
        with dispatched(count):
            call_model(model, inputs)
        return num_flops // _COUNTED_SAMPLES
    return None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SweepTask:
    """One training step, and the cards to try it on.

    Args:
        model: The model's name.
        gpus: Names of the catalogue.
        options: The step, the search and the engine, as keyword arguments of `memfit.survey`.
        is_quick: The workspaces of convolutions are bounds, and cuDNN is not asked for them.
    """

    model: str
    gpus: tuple[str, ...]
    options: Mapping[str, Any]
    is_quick: bool = False

    @property
    def key(self) -> str:
        """A text that is the same for equal tasks, in every process."""
        asked = [
            type(self).__name__,
            self.model,
            self.gpus,
            sorted(self.options.items()),
            self.is_quick,
        ]
        return hashlib.sha256(json.dumps(asked, default=repr).encode()).hexdigest()[:20]

    def run(self) -> tuple[SweepRow, ...]:
        """Return a row for each card; a failure is a row with its reason."""
        try:
            asked = Asked.of(self.model, **self.options)
            facts: list[ModelFacts] = []

            def probed(card: Backend) -> tuple[ProbeResult, int | None]:
                with card:
                    if not facts:
                        facts.append(_facts_on(card, asked.step))
                    return _probed(card, asked)

            answers = asked.on_each(self.gpus, probed, is_quick=self.is_quick)
        except MemfitError as error:
            return self.failed(str(error))
        except Exception as error:  # noqa: BLE001 - timm's code ran; one model must not end a sweep
            return self.failed(first_line(error))
        return tuple(self._row(asked, facts[0], answer) for answer in answers)

    def failed(self, reason: str) -> tuple[SweepRow, ...]:
        """Return a row for each card that says why there are no figures.

        Args:
            reason: The reason, in a sentence.
        """
        try:
            options = Asked.of(self.model, **self.options).step.options
        except MemfitError:
            options = StepOptions()
        memory_bytes = self.options.get("memory")
        return tuple(
            SweepRow(
                model=self.model,
                family=family_of(self.model),
                device=find_gpu(gpu, total_bytes=memory_bytes).name,
                source=source_of(engine_for_several(self.options.get("engine", "auto"))),
                options=options,
                reason=reason,
            )
            for gpu in self.gpus
        )

    def _row(self, asked: Asked, facts: ModelFacts, answer: Answer) -> SweepRow:
        row = SweepRow(
            model=self.model,
            family=family_of(self.model),
            device=answer.gpu,
            source=asked.source_for_several,
            options=asked.step.options,
            num_parameters=facts.num_parameters,
            forward_flops=facts.forward_flops,
            reason=answer.reason,
        )
        if answer.found is None:
            return row
        result, added = answer.found
        return dataclasses.replace(
            row,
            options=result.options,
            capacity_bytes=result.capacity.usable_bytes,
            max_batch_size=result.max_batch_size,
            recommended_batch_size=result.recommended_batch_size,
            edge_found=result.edge_found,
            is_approximate=result.is_approximate,
            peak_bytes=_peak_bytes(result),
            bytes_per_sample=added,
        )


def _facts_on(card: Backend, step: TrainingStep) -> ModelFacts:
    """Return what is known of a model. If the card is simulated, its trace has counted already."""
    if isinstance(card, SimulatedBackend):
        return card.facts(with_precision(step, card))
    return facts_of(step)


def _probed(backend: Backend, asked: Asked) -> tuple[ProbeResult, int | None]:
    """Search on a card. Return the result, and the bytes that one sample more adds."""
    result = run_search(backend, asked.step, asked.search)
    fits = {trial.batch_size: trial for trial in result.trials if trial.fits}
    most = result.max_batch_size
    if len(fits) == 1 and most > 1:
        step = dataclasses.replace(asked.step, options=result.options)
        half = backend.trial(step, most // 2)
        fits[half.batch_size] = half
    return result, _bytes_per_sample(list(fits.values()))


def _bytes_per_sample(fits: list[Trial]) -> int | None:
    """Return how the bytes that tensors ask for grow between the two sizes farthest apart."""
    known = [
        (trial.batch_size, trial.peak_requested_bytes)
        for trial in fits
        if trial.peak_requested_bytes is not None
    ]
    if len(known) < 2:  # noqa: PLR2004 - a slope needs two points
        return None
    (fewest, low), (most, high) = min(known), max(known)
    return (high - low) // (most - fewest)


def _peak_bytes(result: ProbeResult) -> int | None:
    trial = result.trial_at(result.recommended_batch_size or result.max_batch_size)
    return None if trial is None else trial.peak_reserved_bytes


def first_line(error: BaseException) -> str:
    """Return an error that is not memfit's as one line: its class and its first sentence."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
