"""`probe`, `survey` and `estimate`: trials of a training step, real or simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

from typing_extensions import Unpack

from memfit.api.asking import Asked, SearchKeywords
from memfit.api.progress import StageProgress, TrialProgress, Watching, watched
from memfit.api.steps import Subject, SubjectKeywords
from memfit.backends import Backend, with_precision
from memfit.planning import probe_on
from memfit.records import Engine, Parallel, ProbeResult, Survey, SurveyAnswer, Trial
from memfit.units import parse_count

__all__ = ["ProbeKeywords", "estimate", "probe", "survey"]


class ProbeKeywords(SearchKeywords, total=False):
    """The options of `probe` other than the device; they give its overloads their types.

    Args:
        accumulate: As in `probe`.
        parallel: As in `probe`.
        world_size: As in `probe`.
        progress: As in `probe`.
    """

    accumulate: bool
    parallel: str | Parallel | None
    world_size: int
    progress: TrialProgress


@overload
def probe(
    subject: Subject, *, device: str, gpu: None = None, **options: Unpack[ProbeKeywords]
) -> ProbeResult: ...


@overload
def probe(
    subject: Subject, *, device: None = None, gpu: str, **options: Unpack[ProbeKeywords]
) -> ProbeResult: ...


@overload
def probe(
    subject: Subject,
    *,
    device: str | None = None,
    gpu: str | None = None,
    **options: Unpack[ProbeKeywords],
) -> ProbeResult | Survey: ...


def probe(
    subject: Subject,
    *,
    device: str | None = None,
    gpu: str | None = None,
    accumulate: bool = False,
    parallel: str | Parallel | None = None,
    world_size: int = 1,
    progress: TrialProgress = "bar",
    **options: Unpack[SearchKeywords],
) -> ProbeResult | Survey:
    """Find the largest batch size of a training step that fits a device, and prove it.

    When this returns, raises or is interrupted, the user's model, optimizer, gradients, random
    states and switches are the same as before.

    Args:
        subject: A timm model's name, a `Workload` of the user's own objects, a fastai `Learner`, a
            `LightningModule`, or a transformers `Trainer`.
        device: `"cuda"`, `"cuda:1"` or `"cpu"`. Default: the workload's own GPU; for a model's
            name, the first GPU. On a machine without a GPU, common cards are simulated by default.
        gpu: A card that is not in this machine, by its name in the catalogue (`"rtx3090"`), or
            `"any"` with `memory`. Then nothing is measured, and the result says so.
        accumulate: Probe the micro-batch of a step that accumulates gradients.
        parallel: How several ranks share the model: `"ddp"` (`DistributedDataParallel`),
            `"ddp-bucket-view"` (the same with `gradient_as_bucket_view`) or `"fsdp2"`
            (`fully_shard` on each block and on the model). The trial is one rank, on a rehearsed
            card. Default: `"ddp"` if there are several ranks.
        world_size: The number of ranks that train together, each on a device of this kind.
        progress: `"bar"` shows the trials in a terminal or a notebook, after two seconds. A
            function is called with each trial when it has ended. `None` shows nothing.
        **options: The search and the step itself.

            The search: `memory` is what the step may use, as bytes or as text such as `"8GiB"`. On
            a GPU it limits the caching allocator; on a CPU it limits what is used beyond the loaded
            process. Default: all free memory. With `gpu` it is the card's memory, instead of the
            catalogue's value. `engine` is how a `gpu` is tried. `"rehearse"`: torch's own CUDA
            software runs, and its kernels do nothing. `"simulate"`: a model of the card. `"auto"`:
            rehearsed if this system can, otherwise simulated. The environment variable
            MEMFIT_ENGINE can change what `"auto"` is. `headroom` is the share of the capacity that
            the recommendation keeps free, from 0 to below 1; by default 0.05. The recommendation is
            a multiple of `multiple_of`. `max_batch_size` is the largest batch size that is tried;
            by default 65,536.

            The step: `precision` (`"fp32"`, `"amp-bf16"`, `"amp-fp16"`, `"bf16"`, or `"auto"`:
            mixed precision on a GPU, `"fp32"` on a CPU), `optimizer` (a name that timm knows; a
            workload brings its own), and for a timm model `image_size` (pixels, or height and
            width), `num_classes`, `channels_last`, `grad_checkpointing` and `model_kwargs` (for
            `timm.create_model`). A trainer's own object has its own precision. A `LightningModule`
            also takes `datamodule` (a `LightningDataModule` or a loader) and `trainer`.

    Returns:
        The largest batch size, the recommended batch size, and every trial. On a machine without a
        GPU, without `device`, `gpu` and `memory`: a `Survey` with a result for each of the common
        cards. With `memory`: the result of one simulated card with that much memory.

    Raises:
        UsageError: An argument is not valid.
        DoesNotFitError: Not even the smallest batch fits.
        UnsupportedError: This system cannot run such a trial.
    """
    asked = Asked.of(
        subject, accumulate=accumulate, parallel=parallel, world_size=world_size, **options
    )
    instead = asked.cards_instead(device, gpu)
    with watched(f"probing {asked.step.name}", trials=progress) as watching:
        if len(instead) > 1:
            return _surveyed(asked, instead, watching)
        return asked.on_one(
            _probing(asked, watching), device=device, gpu=instead[0] if instead else gpu
        )


def survey(
    subject: Subject,
    *,
    gpus: Sequence[str] | None = None,
    accumulate: bool = False,
    parallel: str | Parallel | None = None,
    world_size: int = 1,
    progress: StageProgress = "bar",
    **options: Unpack[SearchKeywords],
) -> Survey:
    """Try a training step on several GPUs that are not in this machine.

    They are simulated from as few traces as possible, unless the engine is `"rehearse"`.

    Args:
        subject: As in `probe`; it is not changed.
        gpus: Names of the catalogue. Default: a short list of common cards; with `memory`, one card
            with that much memory.
        accumulate: As in `probe`.
        parallel: As in `probe`. With it, engine `"auto"` rehearses each card.
        world_size: As in `probe`.
        progress: `"bar"`, `None`, or a function. It is called with the next card's name, the number
            of cards done, and the number of all cards.
        **options: As in `probe`. `memory` is the memory of each card. Engine `"auto"` simulates.
            With precision `"auto"`, each card uses its own.

    Returns:
        An answer for each card, in the order of `gpus`.

    Raises:
        UsageError: An argument is not valid.
        UnsupportedError: The step cannot be traced, because it needs real values.
    """
    asked = Asked.of(
        subject, accumulate=accumulate, parallel=parallel, world_size=world_size, **options
    )
    with watched(f"probing {asked.step.name}", stages=progress) as watching:
        return _surveyed(asked, asked.cards_named(gpus), watching)


def _probing(asked: Asked, watching: Watching) -> Callable[[Backend], ProbeResult]:
    return lambda card: probe_on(card, asked.step, asked.search, progress=watching.trial)


def _surveyed(asked: Asked, gpus: Sequence[str], watching: Watching) -> Survey:
    """Try a step on several cards."""
    source = asked.source_for_several
    answers = asked.on_each(gpus, _probing(asked, watching), progress=watching.stage)
    return Survey(
        subject=asked.step.name,
        answers=tuple(
            SurveyAnswer(gpu=answer.gpu, result=answer.found, reason=answer.reason, source=source)
            for answer in answers
        ),
        source=source,
        remarks=asked.remarks_on(gpus),
    )


def estimate(
    subject: Subject,
    batch_size: int,
    *,
    gpu: str,
    memory: str | float | None = None,
    engine: str | Engine = Engine.AUTO,
    accumulate: bool = False,
    parallel: str | Parallel | None = None,
    world_size: int = 1,
    **options: Unpack[SubjectKeywords],
) -> Trial:
    """Try one batch size of a training step on a GPU that is not in this machine.

    Args:
        subject: As in `probe`; it is not changed.
        batch_size: Samples in each micro-batch, at least 1.
        gpu: A name of the catalogue, such as `"rtx3090"`; or `"any"` with `memory`, for a card of
            which only the memory is known.
        memory: The card's memory, instead of the catalogue's value.
        engine: As in `probe`.
        accumulate: As in `probe`.
        parallel: As in `probe`.
        world_size: As in `probe`.
        **options: As in `probe`.

    Returns:
        How the trial would end; its `source` says whether it was rehearsed or simulated.

    Raises:
        UsageError: An argument is not valid.
        UnsupportedError: The step cannot be traced, because it needs real values.
    """
    batch_size = parse_count("The batch size", batch_size)
    asked = Asked.of(
        subject,
        accumulate=accumulate,
        parallel=parallel,
        world_size=world_size,
        memory=memory,
        engine=engine,
        **options,
    )

    def tried(card: Backend) -> Trial:
        with card as backend:
            return backend.trial(with_precision(asked.step, backend), batch_size)

    return asked.on_one(tried, device=None, gpu=gpu)
