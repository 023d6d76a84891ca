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
    """The options of `probe` besides where it is asked, for the types of its results.

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

    The user's model, optimizer, gradients, random states and switches are as before when this
    returns, raises or is interrupted.

    Args:
        subject: A timm model's name, or a `Workload` of the user's own objects.
        device: `"cuda"`, `"cuda:1"` or `"cpu"`; by default a workload's own GPU, and for a name
            the first. On a machine without a GPU, common cards are simulated by default.
        gpu: A card that is not there, by its name in the catalogue (`"rtx3090"`), or `"any"` with
            `memory`; nothing is measured then, and the result says so.
        memory: What the step may use: bytes, or text such as `"8GiB"`. On a GPU a cap on the
            caching allocator, on a CPU a limit beyond the loaded process. By default, all that is
            left. With `gpu` it is what the card has, in place of the catalogue's figure.
        engine: How a `gpu` is tried: `"rehearse"` (torch's own CUDA software runs, kernels do
            nothing), `"simulate"`, or `"auto"`: rehearsed where this system can, else simulated.
            The environment variable MEMFIT_ENGINE decides what `"auto"` is.
        accumulate: Probe the micro-batch of a step that accumulates gradients.
        headroom: Share of the capacity that the recommendation keeps free, from 0 to below 1.
        multiple_of: What the recommendation is a multiple of, at least 1.
        max_batch_size: Where the search ends; by default 65,536.
        progress: `"bar"` shows the trials in a terminal or a notebook once two seconds have gone
            by; or a function that is called with each trial when it has ended; `None` is silence.
        **options: The step itself, `StepKeywords`: `precision` (`"fp32"`, `"amp-bf16"`,
            `"amp-fp16"`, `"bf16"`, or `"auto"`: mixed precision on a GPU, `"fp32"` on a CPU),
            `optimizer` (a name that timm knows; a workload brings its own), and for a timm model
            `image_size` (pixels, or height and width), `num_classes`, `channels_last`,
            `grad_checkpointing` and `model_kwargs` (for `timm.create_model`).

    Returns:
        The largest batch size, the one to train with, and every trial. A `Survey` with such an
        answer for each of the common cards, where there is no GPU here and neither `device`, `gpu`
        nor `memory` was given; with `memory`, the answer of one simulated card with so much.

    Raises:
        UsageError: Something asked for cannot be.
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
    """Try a training step on several GPUs that are not there.

    They are simulated, from as few traces as can be, unless the engine is `"rehearse"`.

    Args:
        subject: A timm model's name, or a `Workload`, which is not touched.
        gpus: Names of the catalogue; by default a short list of common cards, and with `memory`
            one card that has so much.
        memory: What each card has, in place of the catalogue's figure.
        engine: As in `probe`; `"auto"` simulates.
        accumulate: As in `probe`.
        headroom: As in `probe`.
        multiple_of: As in `probe`.
        max_batch_size: As in `probe`.
        progress: `"bar"`, `None`, or a function that is called with the next card's name, the
            cards done and those in all.
        **options: As in `probe`; a precision of `"auto"` is each card's own.

    Returns:
        An answer for each card, in the order of `gpus`.

    Raises:
        UsageError: Something asked for cannot be.
        UnsupportedError: The step cannot be traced without values.
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
    """Return what there is to say where the cards are those that stand in for a GPU.

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
    """Try one batch size of a training step on a GPU that is not there.

    Args:
        subject: A timm model's name, or a `Workload`, which is not touched.
        batch_size: Samples in each micro-batch, at least 1.
        gpu: A name of the catalogue, such as `"rtx3090"`; `"any"` with `memory` for a capacity
            alone.
        memory: What the card has, in place of the catalogue's figure.
        engine: As in `probe`.
        accumulate: As in `probe`.
        **options: As in `probe`.

    Returns:
        How it would end; its `source` says whether it was rehearsed or simulated.

    Raises:
        UsageError: Something asked for cannot be.
        UnsupportedError: The step cannot be traced without values.
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
    """Ask the same of several cards that are not there, which share their traces.

    Args:
        names: Names of the catalogue, all looked up first.
        memory: What each card has, in place of the catalogue's figure.
        engine: How they are tried.
        step: What is tried.
        ask: What is asked of each.
        progress: Called with the next card's name, the cards done and those in all.

    Returns:
        For each its name, what was found, and why nothing was where nothing fits.

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
