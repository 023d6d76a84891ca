"""What the loops of the published runs did, and today's loops do not.

The ladder comes from timm's benchmark.py (0.6.7) with torch 1.12, the peaks from timm's train.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from ladders import CHANNELS
from torch.nn import functional as F  # noqa: N812 - its usual name

from memfit.records import Action, Event, Precision
from memfit.simulation.tracing.autocast import CudaAutocast
from memfit.simulation.tracing.semantics import MetaPrecision
from memfit.simulation.tracing.trace import StepTrace
from memfit.step.batches import Layout
from memfit.step.training_step import StepParts, TrainingStep
from memfit.step.unfilled import UnfilledWeights

__all__ = ["OldPrecision", "OldStep", "attention_written_out", "with_batch_of_bytes"]

# No allocation of a trace has this id; those of prefetched batches count down from -1.
_FIRST_ID = -1000


class OldStep(TrainingStep):
    """A step of timm's training benchmark, with the installed timm, which may be of that time.

    The optimizer is SGD with Nesterov momentum and without weight decay. It fills gradients with
    zeros (torch before 2.0). The classes are made after the forward pass. The option `num_classes`
    is for a model that has no classes with this timm.

    Source: `TrainBenchmarkRunner` in timm's benchmark.py (0.6.7).
    """

    def __post_init__(self) -> None:
        """Check nothing: an old timm has other names, and does not say which optimizers it has."""

    def parts(self, device: torch.device) -> StepParts:
        """Build the parts. The model is on the device."""
        import timm
        from timm.optim import create_optimizer_v2

        with UnfilledWeights():
            model = timm.create_model(self.subject, pretrained=False)
            if not model.num_classes:
                model.reset_classifier(self.options.num_classes)
        model.train()

        def images_of(batch_size: int) -> torch.Tensor:
            assert self.options.image_size is not None
            return torch.randn(batch_size, CHANNELS, *self.options.image_size, device=device)

        def loss(outputs: Any) -> torch.Tensor:
            scores = outputs[0] if isinstance(outputs, tuple) else outputs
            classes = torch.empty(len(scores), dtype=torch.long, device=device)
            return F.cross_entropy(scores, classes.random_(model.num_classes))

        def optimizer(_parameters: Any) -> torch.optim.Optimizer:
            made: torch.optim.Optimizer = create_optimizer_v2(model, opt="sgd", lr=1e-4)
            made.zero_grad = _filling(made.zero_grad)  # type: ignore[method-assign]
            return made

        return StepParts(
            model=model,
            batch_of=images_of,
            layout_of=lambda size: Layout.of(images_of(size), num_samples=size),
            place=self.convert(model, device),
            split=lambda images: (images, ()),
            loss=loss,
            optimizer=optimizer,
        )


def _filling(zero_grad: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(zero_grad)
    def fill(set_to_none: bool = True) -> None:
        del set_to_none
        zero_grad(set_to_none=False)

    return fill


class OldPrecision(MetaPrecision):
    """Mixed precision before torch 2.0, in half precision and without a GradScaler."""

    def __init__(self) -> None:
        super().__init__(Precision.AMP_BF16)
        self.autocast = _OldAutocast(torch.float16)


class _OldAutocast(CudaAutocast):
    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Keep the casts until backward ends, because loops called backward inside autocast."""
        with super().forward():
            yield
            kept = dict(self._cache)
        self._cache.update(kept)

    def call(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call an operation. Interpolation runs in the type of its input."""
        if "upsample" in name:
            return func(*args, **kwargs)
        return super().call(func, name, args, kwargs)


@contextlib.contextmanager
def attention_written_out() -> Iterator[None]:
    """Let models compute attention as they did before `scaled_dot_product_attention`."""
    fused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def _attend(  # noqa: PLR0917 - the signature of what it stands in for
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute scores, their softmax, and a second product."""
    # No vision model of those days used them.
    assert not is_causal
    assert not enable_gqa
    scores = (query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores + attn_mask
    return F.dropout(scores.softmax(dim=-1), dropout_p) @ value


def with_batch_of_bytes(trace: StepTrace, step: TrainingStep) -> StepTrace:
    """Return a trace with one batch more on the device, of bytes.

    timm's PrefetchLoader copies images as bytes and converts them on the device.

    Args:
        trace: The trace.
        step: What was traced.
    """
    inputs, targets = step.prepare(torch.device("meta")).make_batch(1)
    sizes = tuple(tensor.numel() for tensor in (inputs, *targets))
    setup = trace.schedule.setup
    events = tuple(
        Event(action=Action.ALLOC, id=_FIRST_ID - index, num_bytes=size * setup.batch_size)
        for index, size in enumerate(sizes)
    )
    longer = dataclasses.replace(
        setup, events=setup.events + events, growth_bytes=setup.growth_bytes + sizes
    )
    return dataclasses.replace(trace, schedule=dataclasses.replace(trace.schedule, setup=longer))
