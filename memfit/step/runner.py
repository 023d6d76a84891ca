"""Runs the iterations of a training step on its device.

`memfit.step.workload` describes a step and builds it. An iteration runs micro-batches forward and
backward, takes the optimizer's step, and zeroes the gradients. `memfit.step.calling` calls the
model.
"""

from __future__ import annotations

import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memfit._torch_private import is_compiled
from memfit.errors import WorkloadError
from memfit.memory import oom
from memfit.records import Averaging, Evaluation, Parallel, Precision, StepOptions
from memfit.step.calling import call_loss, call_model, users_code
from memfit.step.compiling import CompiledModel
from memfit.step.draws import Draws
from memfit.step.loop_habits import StepInBackward, WeightAverage
from memfit.step.optimizers import stepped_by, without_closure
from memfit.step.precision import PrecisionPolicy, TorchPrecision, autocast
from memfit.step.ranks import Replicated, check_all_used

__all__ = [
    "PrecisionPolicy",
    "PreparedStep",
    "added",
    "autocast",
    "check_loss",
    "check_losses",
]

_DDP = (Parallel.DDP, Parallel.DDP_BUCKET_VIEW)
# Every module has these, and torch fills them.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class PreparedStep:
    """A training step on its device: model, batches, loss, optimizer.

    Args:
        model: The model, on its device.
        make_batch: A function from a batch size to the model's inputs and the loss's targets.
        loss: A function from outputs and targets to one number, or to several that are added.
        make_optimizer: A function that returns the optimizer that a trial begins with.
        device: The device of all of these.
        options: What else the step does; its precision is not `AUTO`.
        num_micro_batches: The number of micro-batches in one iteration.
        precision_policy: Replaces torch's autocast and GradScaler.

    `peak_varies` says of the last trial that its peak depended on what the step drew.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        make_batch: Callable[[int], tuple[Any, tuple[Any, ...]]],
        loss: Callable[..., torch.Tensor],
        make_optimizer: Callable[[], Optimizer],
        device: torch.device,
        options: StepOptions,
        num_micro_batches: int,
        precision_policy: PrecisionPolicy | None = None,
    ) -> None:
        if options.precision is Precision.AUTO:
            raise ValueError("a prepared step needs a precision that was chosen")
        self.model = model
        self.num_micro_batches = num_micro_batches
        self.make_batch = make_batch
        self._loss = loss
        self._make_optimizer = make_optimizer
        self.precision_policy = precision_policy or TorchPrecision(device, options.precision)
        self._optimizer: Optimizer | None = None
        self._had_state = False
        self._draws: Draws | None = None
        self.peak_varies = False
        self._device = device
        self._options = options
        self._average: WeightAverage | None = None
        self._in_backward: StepInBackward | None = None
        self._compiled = CompiledModel(model) if options.compile else None
        self._replicated: Replicated | None = None
        if options.parallel in _DDP:
            has_views = options.parallel is Parallel.DDP_BUCKET_VIEW
            self._replicated = Replicated(model, device, has_views=has_views)
        self._modes: list[tuple[nn.Module, bool]] = []
        self._held: dict[str, Any] = {}
        self._waiting: deque[tuple[Any, tuple[Any, ...]]] = deque()
        self._waiting_size = 0

    @property
    def num_forwards(self) -> int:
        """Forward passes in one iteration."""
        return self.num_micro_batches if self._options.evaluate is None else 1

    @contextlib.contextmanager
    def drawing(self, draws: Draws) -> Iterator[None]:
        """Count and force the draws of forward, loss and backward in the iterations of the block.

        Compiled code is not watched, because it would have to be compiled again.

        Args:
            draws: Counts the draws, and forces them if it has a share.
        """
        self._draws = None if self.has_compiled_code else draws
        try:
            yield
        finally:
            self._draws = None

    @property
    def has_compiled_code(self) -> bool:
        """Whether the model, or a part of it, is compiled, so that its modules are not followed."""
        return self._compiled is not None or any(map(is_compiled, self.model.modules()))

    @property
    def loss_module(self) -> nn.Module | None:
        """The loss if it is a module, which may have parameters and buffers; else `None`."""
        return self._loss if isinstance(self._loss, nn.Module) else None

    @property
    def is_channels_last(self) -> bool:
        """Whether the model was moved to the device first, and to the other layout then."""
        return self._options.channels_last

    def held_tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor that exists before an iteration begins, some more than once.

        These are parameters and buffers, other tensors that the modules keep in attributes and
        containers, and the optimizer's parameters and state. Modules come in the order in which
        `Module.to` moves them: what a module contains is before it.
        """
        for root in (self.model, self.loss_module):
            for module in () if root is None else _from_inside(root, set()):
                yield from module.parameters(recurse=False)
                yield from module.buffers(recurse=False)
                for name, value in vars(module).items():
                    if name not in _OF_EVERY_MODULE and not isinstance(value, nn.Module):
                        yield from _tensors_in(value)
        if self._optimizer is not None:
            yield from stepped_by(self._optimizer)
            for state in self._optimizer.state.values():
                yield from _tensors_in(state)
        yield from self.averages

    @property
    def is_rank(self) -> bool:
        """Whether it is one rank of many."""
        return self._options.parallel is not None

    @property
    def averages(self) -> Sequence[torch.Tensor]:
        """The tensors of the average of the weights; empty if there is none."""
        return () if self._average is None else self._average.tensors

    @property
    def num_prefetched(self) -> int:
        """Batches that wait on the device besides the one that is used.

        On the meta device none is made: a trace adds their bytes to what exists beforehand.
        """
        return self._options.prefetch

    def begin(self) -> None:
        """Start as training does, with the optimizer as it was given and without gradients.

        Raises:
            WorkloadError: The optimizer steps only with a closure.
        """
        self.end()
        if self._options.evaluate is not None:
            self._modes = [(module, module.training) for module in self.model.modules()]
            self.model.eval()
        if self._options.evaluate is not Evaluation.ALONE:
            self._begin_training()
        self._drop_gradients()

    def _begin_training(self) -> None:
        options = self._options
        if self._replicated is not None:
            # As in a script: the wrapper and its buckets are there before the optimizer.
            _ = self._replicated.module
        self._optimizer = self._make_optimizer()
        if isinstance(self._optimizer, torch.optim.LBFGS):
            raise WorkloadError(
                "LBFGS runs the step several times, through a closure. memfit runs "
                "each step once. Give an optimizer whose step takes no closure."
            )
        self._had_state = bool(self._optimizer.state)
        is_host = options.ema is Averaging.CPU and self._device.type != "cpu"
        if options.ema is not None and not is_host:
            self._average = WeightAverage(self.model)
        if options.evaluate is not None:
            # Backward has run before a validation, and keeps a workspace of its own thread.
            weight = torch.ones(1, 1, device=self._device, requires_grad=True)
            torch.mm(weight, weight).sum().backward()
            try:
                self.step_on_zeros()
            except RuntimeError as error:
                # Some optimizers refuse gradients of zero. Their state is then left out.
                if oom.classify(error) is not oom.Likelihood.NO:
                    raise
        elif options.optimizer_in_backward:
            self._in_backward = StepInBackward(self._optimizer)

    def end(self) -> None:
        """Drop the gradients, the optimizer, its new state, and what a loop holds."""
        if self._in_backward is not None:
            self._in_backward.close()
        for module, mode in self._modes:
            module.training = mode
        self._modes = []
        self._in_backward = self._average = None
        if self._compiled is not None:
            self._compiled.forget()
        if self._replicated is not None:
            self._replicated.forget()
        self._held.clear()
        self._waiting.clear()
        if self._optimizer is not None and not self._had_state:
            self._optimizer.state.clear()
        self._optimizer = None
        self._drop_gradients()

    def iterate(self, batch_size: int) -> None:
        """Run one iteration: every micro-batch forward and backward, step, gradients zeroed.

        Args:
            batch_size: Samples in each micro-batch, at least 1.

        Raises:
            WorkloadError: The loss is not one number that has a gradient.
        """
        self.accumulate(batch_size)
        self.update()

    def accumulate(self, batch_size: int) -> None:
        """Run the first part of an iteration: every micro-batch forward and backward.

        Args:
            batch_size: Samples in each micro-batch, at least 1.

        Raises:
            WorkloadError: The loss is not one number that has a gradient.
        """
        if self._options.evaluate is not None:
            with users_code():
                self._evaluate(batch_size)
            return
        if self._optimizer is None:
            self.begin()
        with users_code():
            for index in range(self.num_micro_batches):
                is_last = index == self.num_micro_batches - 1
                with contextlib.nullcontext() if is_last else self._unsynchronised():
                    self._backward(batch_size)
            if self._replicated is not None:
                check_all_used(self.model)

    def update(self) -> None:
        """Run the second part: the optimizer's step. Then drop the gradients."""
        if self._options.evaluate is not None:
            return
        assert self._optimizer is not None
        with users_code():
            with without_closure(self._optimizer):
                self.precision_policy.step(self._optimizer)
            self._optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update()

    def step_on_zeros(self) -> None:
        """Let the optimizer take a step on gradients of zero, so that its state exists."""
        if self._optimizer is None:
            return
        parameters = list(stepped_by(self._optimizer))
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        try:
            with without_closure(self._optimizer):
                self._optimizer.step()
        finally:
            # This also runs if the optimizer refused them. Some take only sparse gradients.
            for parameter in parameters:
                parameter.grad = None

    @property
    def optimizer_state_bytes(self) -> int:
        """Bytes of tensors in the optimizer's state."""
        if self._optimizer is None:
            return 0
        return sum(
            value.untyped_storage().nbytes()
            for values in self._optimizer.state.values()
            for value in values.values()
            if isinstance(value, torch.Tensor)
        )

    def _generators(self) -> Iterator[random.Random]:
        """Yield Python's generators that the model owns, each once."""
        owned = {
            id(value): value
            for module in self.model.modules()
            for value in vars(module).values()
            if isinstance(value, random.Random)
        }
        yield from owned.values()

    def _drop_gradients(self) -> None:
        for module in (self.model, self.loss_module):
            if module is not None:
                module.zero_grad(set_to_none=True)

    def _backward(self, batch_size: int) -> None:
        inputs, targets = self._next_batch(batch_size)
        self._hold(batch=(inputs, targets))
        with (
            contextlib.nullcontext()
            if self._draws is None
            else self._draws.watched(*self._generators())
        ):
            with self.precision_policy.forward():
                loss = call_loss(self._loss, self._outputs_of(inputs), targets)
            loss = added(loss)
            check_loss(loss)
            self._hold(loss=loss)
            self.precision_policy.backward(loss / self.num_micro_batches)

    def _unsynchronised(self) -> contextlib.AbstractContextManager[None]:
        """Return the context for micro-batches before the last one.

        FSDP2 sums gradients in every micro-batch, so that no rank holds whole gradients.
        """
        if self._replicated is None:
            return contextlib.nullcontext()
        return self._replicated.unsynchronised()

    def _outputs_of(self, inputs: Any) -> Any:
        model = self.model
        for wrapper in (self._compiled, self._replicated):
            model = model if wrapper is None else wrapper.module
        outputs = call_model(model, inputs)
        self._hold(outputs=outputs)
        return outputs

    def _evaluate(self, batch_size: int) -> None:
        inputs, targets = self._next_batch(batch_size)
        self._hold(batch=(inputs, targets))
        # Inference mode hides the parts of an operation from a trace. They are the same without
        # gradients.
        is_no_grad = self._options.no_grad or self._device.type == "meta"
        with (
            torch.no_grad() if is_no_grad else torch.inference_mode(),
            self.precision_policy.forward(),
        ):
            self._outputs_of(inputs)

    def _hold(self, **values: Any) -> None:
        """Keep what a loop's variables hold until the next iteration replaces it."""
        if self._options.keeps_outputs:
            self._held.update(values)

    def _next_batch(self, batch_size: int) -> tuple[Any, tuple[Any, ...]]:
        """Return the next batch; others wait on the device behind it."""
        if self._device.type == "meta" or not self._options.prefetch:
            return self.make_batch(batch_size)
        if batch_size != self._waiting_size:
            self._waiting.clear()
            self._waiting_size = batch_size
        while len(self._waiting) <= self._options.prefetch:
            self._waiting.append(self.make_batch(batch_size))
        return self._waiting.popleft()


def _from_inside(module: nn.Module, seen: set[nn.Module]) -> Iterator[nn.Module]:
    """Yield a module and all that it contains, each once, and after what it contains itself."""
    if module not in seen:
        seen.add(module)
        for child in module.children():
            yield from _from_inside(child, seen)
        yield module


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a value that modules and optimizers keep."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, set, deque)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, Mapping):
        yield from _tensors_in(tuple(value.values()))


def added(losses: Any) -> Any:
    """Return the sum of several losses (a mapping, tuple or list), or a single loss itself."""
    several = tuple(losses.values()) if isinstance(losses, Mapping) else losses
    if not isinstance(several, (tuple, list)) or not several:
        return losses
    check_losses(several)
    return torch.stack([loss.reshape(()) for loss in several]).sum()


def check_losses(losses: Sequence[object]) -> None:
    """Refuse losses whose sum `backward` cannot begin with.

    Some of them may have no gradient, such as an accuracy among the losses.

    Raises:
        WorkloadError: A loss is not one number, or none has a gradient.
    """
    for loss in losses:
        _check_is_number(loss)
    if not any(isinstance(loss, torch.Tensor) and loss.requires_grad for loss in losses):
        if len(losses) == 1:
            check_loss(losses[0])
        raise WorkloadError(
            "None of the losses has a gradient, because none depends on the parameters."
        )


def check_loss(loss: object) -> None:
    """Refuse a loss that `backward` cannot begin with.

    Raises:
        WorkloadError: The loss is not one number that has a gradient.
    """
    _check_is_number(loss)
    if isinstance(loss, torch.Tensor) and not loss.requires_grad:
        raise WorkloadError("The loss has no gradient: it does not depend on the parameters.")


def _check_is_number(loss: object) -> None:
    if not isinstance(loss, torch.Tensor):
        raise WorkloadError(f"The loss must be a tensor of one number, not {type(loss).__name__}.")
    if loss.numel() != 1:
        raise WorkloadError(
            f"The loss has the shape {tuple(loss.shape)}, but backward needs a "
            "single number. End the loss with .mean() or .sum()."
        )
