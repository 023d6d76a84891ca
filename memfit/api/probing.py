"""`probe`, `survey` and `estimate`: trials of a training step, real or simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

from typing_extensions import Unpack

from memfit.api.cards import Cards, engine_for_several, engine_of, source_of
from memfit.api.progress import StageProgress, TrialProgress, Watching, watched
from memfit.api.steps import StepKeywords, cards_instead, default_gpus, describe, own_device
from memfit.backends import Backend, open_backend, with_precision
from memfit.cards import ANY_GPU, COMMON_GPUS, find_gpu
from memfit.errors import DoesNotFitError, UsageError
from memfit.planning import SearchBounds, probe_on
from memfit.records import Engine, ProbeResult, Survey, SurveyAnswer, Trial
from memfit.step.workload import TrainingStep, Workload
from memfit.units import parse_bytes, parse_count

__all__ = ["ProbeKeywords", "estimate", "on_each_card", "probe", "remarks_on", "survey"]

_Found = TypeVar("_Found")

_NO_GPU = (
    "There is no GPU here and none was named, so common cards were simulated; device='cpu' "
    "(--device cpu) measures on the CPU."
)


class ProbeKeywords(StepKeywords, total=False):
    """The options of `probe` other than the device; they give its overloads their types.

    Args:
        memory: As in `probe`.
        engine: As in `probe`.
        accumulate: As in `probe`.
        headroom: As in `probe`.
        multiple_of: As in `probe`.
        max_batch_size: As in `probe`.
        progress: As in `probe`.
    """

    memory: str | float | None
    engine: str | Engine
    accumulate: bool
    headroom: float
    multiple_of: int
    max_batch_size: int | None
    progress: TrialProgress


@overload
def probe(
    subject: str | Workload, *, device: str, gpu: None = None, **options: Unpack[ProbeKeywords]
) -> ProbeResult: ...


@overload
def probe(
    subject: str | Workload, *, device: None = None, gpu: str, **options: Unpack[ProbeKeywords]
) -> ProbeResult: ...


@overload
def probe(
    subject: str | Workload,
    *,
    device: str | None = None,
    gpu: str | None = None,
    **options: Unpack[ProbeKeywords],
) -> ProbeResult | Survey: ...


def probe(
    subject: str | Workload,
    *,
    device: str | None = None,
    gpu: str | None = None,
    memory: str | float | None = None,
    engine: str | Engine = Engine.AUTO,
    accumulate: bool = False,
    headroom: float = 0.05,
    multiple_of: int = 1,
    max_batch_size: int | None = None,
    progress: TrialProgress = "bar",
    **options: Unpack[StepKeywords],
) -> ProbeResult | Survey:
    """Find the largest batch size of a training step that fits a device, and prove it.

    When this returns, raises or is interrupted, the user's model, optimizer, gradients, random
    states and switches are the same as before.

    Args:
        subject: A timm model's name, or a `Workload` of the user's own objects.
        device: `"cuda"`, `"cuda:1"` or `"cpu"`. Default: the workload's own GPU; for a model's
            name, the first GPU. On a machine without a GPU, common cards are simulated by default.
        gpu: A card that is not in this machine, by its name in the catalogue (`"rtx3090"`), or
            `"any"` with `memory`. Then nothing is measured, and the result says so.
        memory: What the step may use: bytes, or text such as `"8GiB"`. On a GPU it limits the
            caching allocator; on a CPU it limits what is used beyond the loaded process. Default:
            all free memory. With `gpu`: the card's memory, instead of the catalogue's value.
        engine: How a `gpu` is tried. `"rehearse"`: torch's own CUDA software runs, and its kernels
            do nothing. `"simulate"`: a model of the card. `"auto"`: rehearsed if this system can,
            otherwise simulated. The environment variable MEMFIT_ENGINE can change what `"auto"` is.
        accumulate: Probe the micro-batch of a step that accumulates gradients.
        headroom: Share of the capacity that the recommendation keeps free, from 0 to below 1.
        multiple_of: The recommendation is a multiple of this, at least 1.
        max_batch_size: The largest batch size that is tried; by default 65,536.
        progress: `"bar"` shows the trials in a terminal or a notebook, after two seconds. A
            function is called with each trial when it has ended. `None` shows nothing.
        **options: The step itself, `StepKeywords`: `precision` (`"fp32"`, `"amp-bf16"`,
            `"amp-fp16"`, `"bf16"`, or `"auto"`: mixed precision on a GPU, `"fp32"` on a CPU),
            `optimizer` (a name that timm knows; a workload brings its own), and for a timm model
            `image_size` (pixels, or height and width), `num_classes`, `channels_last`,
            `grad_checkpointing` and `model_kwargs` (for `timm.create_model`).

    Returns:
        The largest batch size, the recommended batch size, and every trial. On a machine without a
        GPU, without `device`, `gpu` and `memory`: a `Survey` with a result for each of the common
        cards. With `memory`: the result of one simulated card with that much memory.

    Raises:
        UsageError: An argument is not valid.
        DoesNotFitError: Not even the smallest batch fits.
        UnsupportedError: This system cannot run such a trial.
    """
    step = describe(subject, accumulate=accumulate, **options)
    bounds = SearchBounds(headroom=headroom, multiple_of=multiple_of, max_batch_size=max_batch_size)
    memory_bytes = None if memory is None else parse_bytes(memory)
    instead = cards_instead(subject, device=device, gpu=gpu, memory=memory)
    with watched(f"probing {step.name}", trials=progress) as watching:
        if len(instead) > 1:
            return _surveyed(
                step, instead, memory=None, engine=engine, bounds=bounds, watching=watching
            )
        if gpu is not None and device is not None:
            raise UsageError(f"Give a device ({device}) or a GPU to simulate ({gpu}), not both.")
        for name in (gpu,) if gpu is not None else instead:
            with Cards(engine_of(engine)) as cards:
                card = cards.open(name, memory_bytes, step)
                return probe_on(card, step, bounds, progress=watching.trial)
        backend = open_backend(
            own_device(subject, device), memory_bytes=memory_bytes, headroom=headroom
        )
        return probe_on(backend, step, bounds, progress=watching.trial)


def survey(
    subject: str | Workload,
    *,
    gpus: Sequence[str] | None = None,
    memory: str | float | None = None,
    engine: str | Engine = Engine.AUTO,
    accumulate: bool = False,
    headroom: float = 0.05,
    multiple_of: int = 1,
    max_batch_size: int | None = None,
    progress: StageProgress = "bar",
    **options: Unpack[StepKeywords],
) -> Survey:
    """Try a training step on several GPUs that are not in this machine.

    They are simulated from as few traces as possible, unless the engine is `"rehearse"`.

    Args:
        subject: A timm model's name, or a `Workload`, which is not changed.
        gpus: Names of the catalogue. Default: a short list of common cards; with `memory`, one card
            with that much memory.
        memory: The memory of each card, instead of the catalogue's value.
        engine: As in `probe`; `"auto"` simulates.
        accumulate: As in `probe`.
        headroom: As in `probe`.
        multiple_of: As in `probe`.
        max_batch_size: As in `probe`.
        progress: `"bar"`, `None`, or a function. It is called with the next card's name, the number
            of cards done, and the number of all cards.
        **options: As in `probe`; with precision `"auto"`, each card uses its own.

    Returns:
        An answer for each card, in the order of `gpus`.

    Raises:
        UsageError: An argument is not valid.
        UnsupportedError: The step cannot be traced, because it needs real values.
    """
    step = describe(subject, accumulate=accumulate, **options)
    bounds = SearchBounds(headroom=headroom, multiple_of=multiple_of, max_batch_size=max_batch_size)
    names = tuple(gpus) if gpus else (COMMON_GPUS if memory is None else (ANY_GPU,))
    with watched(f"probing {step.name}", stages=progress) as watching:
        return _surveyed(
            step, names, memory=memory, engine=engine, bounds=bounds, watching=watching
        )


def _surveyed(
    step: TrainingStep,
    names: Sequence[str],
    *,
    memory: str | float | None,
    engine: str | Engine,
    bounds: SearchBounds,
    watching: Watching,
) -> Survey:
    """Try a step on several cards."""
    chosen = engine_for_several(engine)
    source = source_of(chosen)
    answers = on_each_card(
        names,
        memory,
        chosen,
        step,
        lambda card: probe_on(card, step, bounds, progress=watching.trial),
        progress=watching.stage,
    )
    return Survey(
        subject=step.name,
        answers=tuple(
            SurveyAnswer(gpu=gpu, result=result, reason=reason, source=source)
            for gpu, result, reason in answers
        ),
        source=source,
        remarks=remarks_on(names),
    )


def remarks_on(names: Sequence[str]) -> tuple[str, ...]:
    """Return remarks for the case that no GPU was found and common cards were tried instead.

    Args:
        names: The cards that were tried.
    """
    return (_NO_GPU,) if tuple(names) == default_gpus() else ()


def estimate(
    subject: str | Workload,
    batch_size: int,
    *,
    gpu: str,
    memory: str | float | None = None,
    engine: str | Engine = Engine.AUTO,
    accumulate: bool = False,
    **options: Unpack[StepKeywords],
) -> Trial:
    """Try one batch size of a training step on a GPU that is not in this machine.

    Args:
        subject: A timm model's name, or a `Workload`, which is not changed.
        batch_size: Samples in each micro-batch, at least 1.
        gpu: A name of the catalogue, such as `"rtx3090"`; or `"any"` with `memory`, for a card of
            which only the memory is known.
        memory: The card's memory, instead of the catalogue's value.
        engine: As in `probe`.
        accumulate: As in `probe`.
        **options: As in `probe`.

    Returns:
        How the trial would end; its `source` says whether it was rehearsed or simulated.

    Raises:
        UsageError: An argument is not valid.
        UnsupportedError: The step cannot be traced, because it needs real values.
    """
    batch_size = parse_count("The batch size", batch_size)
    step = describe(subject, accumulate=accumulate, **options)
    memory_bytes = None if memory is None else parse_bytes(memory)
    with Cards(engine_of(engine)) as cards, cards.open(gpu, memory_bytes, step) as backend:
        return backend.trial(with_precision(step, backend), batch_size)


def on_each_card(
    names: Sequence[str],
    memory: str | float | None,
    engine: Engine,
    step: TrainingStep,
    ask: Callable[[Backend], _Found],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[tuple[str, _Found | None, str | None]]:
    """Run the same task on several cards that are not in this machine; they share traces.

    Args:
        names: Names of the catalogue. All are looked up before the first card is tried.
        memory: The memory of each card, instead of the catalogue's value.
        engine: How the cards are tried.
        step: The step that is tried.
        ask: The task that runs on each card.
        progress: Called with the next card's name, the number of cards done, and of all cards.

    Returns:
        For each card its name, the result, and the reason if nothing fits.

    Raises:
        UsageError: There is no such card.
    """
    memory_bytes = None if memory is None else parse_bytes(memory)

    def asked(card: Backend) -> tuple[str, _Found | None, str | None]:
        try:
            return card.device_name, ask(card), None
        except DoesNotFitError as error:
            return card.device_name, None, str(error)

    found = [find_gpu(name, total_bytes=memory_bytes) for name in names]
    answers = []
    with Cards(engine) as cards:
        for done, (name, card) in enumerate(zip(names, found, strict=True)):
            if progress is not None:
                progress(card.name, done, len(names))
            answers.append(asked(cards.open(name, memory_bytes, step)))
    return answers
