"""`choose`: the most accurate models that can be fine-tuned on one card."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from memfit.accuracies import Accuracy, accuracies, accuracy_source, best_of
from memfit.api.asking import Asked, SearchKeywords
from memfit.api.progress import StageProgress, watched
from memfit.backends import Backend
from memfit.cards import find_gpu
from memfit.errors import DoesNotFitError, MemfitError
from memfit.planning import PlanTarget, plan_on
from memfit.records import Choice, ChoiceRow, Engine, Plan, StepOptions
from memfit.rehearsal.engines import engine_for_several, source_of
from memfit.step.timm_models import import_timm
from memfit.sweeping.running import answered, cards_of, cards_to_try, pool_for
from memfit.sweeping.selection import Selected, select
from memfit.sweeping.tasks import SweepTask, facts_of, first_line
from memfit.units import parse_count, parse_image_size

__all__ = ["ChoiceTask", "choose"]

_TOP = 10
_MAX_STEPS = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceTask(SweepTask):
    """One model, planned for one card.

    Args:
        effective_batch_size: Samples in each optimizer step.
        accuracy: What the model's best weights reach; `None` if nothing is published.
    """

    effective_batch_size: int
    accuracy: Accuracy | None

    @property
    def key(self) -> str:
        """A text that is the same for equal tasks, in every process."""
        return f"{SweepTask.key.fget(self)}-{self.effective_batch_size}"  # type: ignore[attr-defined]

    def run(self) -> tuple[ChoiceRow, ...]:  # type: ignore[override]
        """Return the model's row; a failure is a row with its reason."""
        try:
            return (self._planned(),)
        except MemfitError as error:
            return self.failed(str(error))
        except Exception as error:  # noqa: BLE001 - timm's code ran; one model must not end a choice
            return self.failed(first_line(error))

    def failed(self, reason: str) -> tuple[ChoiceRow, ...]:  # type: ignore[override]
        """Return a row that says why there is no plan.

        Args:
            reason: The reason, in a sentence.
        """
        return (dataclasses.replace(self._known(StepOptions()), reason=reason),)

    def _planned(self) -> ChoiceRow:
        asked = Asked.of(self.model, **self.options)
        facts = facts_of(asked.step)
        row = dataclasses.replace(
            self._known(asked.step.options), num_parameters=facts.num_parameters
        )
        (answer,) = asked.on_each(self.gpus, lambda card: self._plan(card, asked))
        plan: Plan | None = answer.found
        checkpointed = None
        if plan is None or plan.accumulation_steps > 1:
            checkpointed = self._checkpointed()
        if plan is None:
            return dataclasses.replace(
                row, reason=answer.reason, checkpointed_micro_batch_size=checkpointed
            )
        return dataclasses.replace(
            row,
            options=dataclasses.replace(plan.options, accumulate=False),
            micro_batch_sizes=plan.micro_batch_sizes,
            recommended_micro_batch_size=plan.recommended_micro_batch_size,
            checkpointed_micro_batch_size=checkpointed,
            is_exact=None if plan.accumulation_steps == 1 else not facts.has_batch_norm,
            peak_bytes=plan.peak_reserved_bytes,
        )

    def _plan(self, card: Backend, asked: Asked) -> Plan:
        return plan_on(card, asked.step, PlanTarget.of(self.effective_batch_size, asked.search))

    def _checkpointed(self) -> int | None:
        """Return the micro-batch with gradient checkpointing; `None` if it has none."""
        try:
            asked = Asked.of(self.model, **{**self.options, "grad_checkpointing": True})
            (answer,) = asked.on_each(self.gpus, lambda card: self._plan(card, asked))
        except (MemfitError, ValueError):
            return None
        plan: Plan | None = answer.found
        return None if plan is None else plan.recommended_micro_batch_size

    def _known(self, options: StepOptions) -> ChoiceRow:
        known = self.accuracy
        memory_bytes = self.options.get("memory")
        return ChoiceRow(
            model=self.model if known is None else known.model,
            device=find_gpu(self.gpus[0], total_bytes=memory_bytes).name,
            source=source_of(engine_for_several(self.options.get("engine", Engine.AUTO))),
            options=options,
            top1_percent=None if known is None else known.top1_percent,
            top1_image_size=None if known is None else known.image_size,
        )


def choose(
    models: str | Iterable[str] = (),
    *,
    gpu: str,
    effective_batch_size: int,
    top: int | None = None,
    max_steps: int = _MAX_STEPS,
    workers: int | None = None,
    ray: str | None = None,
    journal: str | Path | None = None,
    progress: StageProgress = "bar",
    **options: Unpack[SearchKeywords],
) -> Choice:
    """Find the most accurate timm models that can be fine-tuned on a card, and plan each.

    Models are tried from the best published accuracy on ImageNet down, each on images of the size
    at which that accuracy was measured, until `top` of them fit. With `models`, all of those are
    tried.

    Args:
        models: Names, wildcards or a text file, as in `sweep`; by default every model whose
            accuracy is published.
        gpu: A card of the catalogue, or `"any"` with `memory`.
        effective_batch_size: Samples in each optimizer step.
        top: How many models to return; by default 10, and all of `models` if they are given.
        max_steps: A model that needs more accumulation steps than this does not count as fitting.
        workers: As in `sweep`.
        ray: As in `sweep`.
        journal: As in `sweep`.
        progress: As in `sweep`.
        **options: The search and the step, as in `plan`. `image_size` is for all models.

    Returns:
        The models with their plans, best first.

    Raises:
        UsageError: An argument is not valid.
        DoesNotFitError: None of the models fits.
        UnsupportedError: Ray is not installed, or its cluster has several versions.
    """
    batch_size = parse_count("The effective batch size", effective_batch_size)
    most_steps = parse_count("max_steps", max_steps)
    wanted = None if top is None else parse_count("top", top)
    given = (models,) if isinstance(models, str) else tuple(models)
    cards = cards_to_try((gpu,), options)
    (device,) = (card.name for card in cards_of(cards, options))
    if not given and wanted is None:
        wanted = _TOP
    tasks = tuple(
        ChoiceTask(
            model=model.name,
            gpus=cards,
            options=_checked(model, options),
            effective_batch_size=batch_size,
            accuracy=accuracy,
        )
        for model, accuracy in _candidates(given)
    )

    def fits(row: ChoiceRow) -> bool:
        return row.accumulation_steps is not None and row.accumulation_steps <= most_steps

    def is_enough(answers: Mapping[str, tuple[ChoiceRow, ...]]) -> bool:
        """Whether the best models are known: no better one is still being tried."""
        known = itertools.takewhile(lambda task: task.key in answers, tasks)
        rows = (row for task in known for row in answers[task.key])
        return wanted is not None and sum(map(fits, rows)) >= wanted

    with watched("choosing", stages=progress) as watching:
        done, is_complete = answered(
            tasks,
            ChoiceRow,
            pool_for(len(tasks), workers=workers, ray=ray),
            journal=journal,
            progress=watching.stage,
            is_enough=is_enough,
        )
    rows = [row for task in tasks if task.key in done for row in done[task.key]]
    fitting = [row for row in rows if fits(row)]
    if not fitting and is_complete:
        reasons = {row.reason for row in rows if row.reason}
        why = f" {reasons.pop()}" if len(reasons) == 1 else ""
        raise DoesNotFitError(
            f"None of {len(rows)} models fits {device} at an effective batch of {batch_size} in at "
            f"most {most_steps} steps.{why}"
        )
    failed = [_with_reason(row, most_steps) for row in rows if not fits(row)] if given else []
    return Choice(
        device=device,
        effective_batch_size=batch_size,
        rows=(*fitting[:wanted], *failed),
        num_tried=len(rows),
        num_known=len(tasks),
        accuracy_source=accuracy_source(),
        is_complete=is_complete,
    )


def _with_reason(row: ChoiceRow, most_steps: int) -> ChoiceRow:
    """Say why a model that was asked for is not chosen, if its row does not."""
    if row.reason is not None:
        return row
    reason = f"it needs {row.accumulation_steps} accumulation steps, more than {most_steps}."
    return dataclasses.replace(row, reason=reason)


def _candidates(patterns: tuple[str, ...]) -> Iterator[tuple[Selected, Accuracy | None]]:
    """Yield models with their accuracies, best first; each on the image size of its accuracy."""
    if patterns:
        asked = [(model, best_of(model.name)) for model in select(patterns)]
        asked.sort(key=lambda pair: -(pair[1].top1_percent if pair[1] else 0))
        for model, accuracy in asked:
            yield _sized(model, accuracy), accuracy
        return
    is_model = import_timm().is_model
    seen = set()
    for accuracy in accuracies():
        model = _sized(Selected(accuracy.architecture), accuracy)
        if model not in seen and is_model(model.name):
            seen.add(model)
            yield model, accuracy


def _sized(model: Selected, accuracy: Accuracy | None) -> Selected:
    if model.image_size is not None or accuracy is None:
        return model
    return Selected(model.name, (accuracy.image_size, accuracy.image_size))


def _checked(model: Selected, options: SearchKeywords) -> dict[str, Any]:
    """Return the options of a model's step."""
    given: dict[str, Any] = dict(options)
    size = given.get("image_size") or model.image_size
    given["image_size"] = None if size is None else parse_image_size(size)
    given["engine"] = engine_for_several(given.get("engine", Engine.AUTO)).value
    Asked.of(model.name, **given)
    return given
