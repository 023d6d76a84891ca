"""Records one step's allocations with torch's own recorder, and notes that tell them apart.

Tensors are noted by their addresses, so no tensor of the script is kept alive.
`memfit.profiling.rehearsed` reads the file.
"""

from __future__ import annotations

import gc
import pickle
import time
import weakref
from types import ModuleType
from typing import Any

from .internals import Internals
from .journal import Journal
from .lines import of_script
from .modules import Modules

__all__ = ["History"]

_MAX_EQUAL_STEPS = 4
_BLOCK_BYTES = 512  # The allocator hands out multiples of this.
_KEPT = "(kept by the script)"


class History:
    """The allocator's history since the last step, and the notes that go with it.

    Args:
        torch: The module torch.
        internals: torch's private functions.
        journal: The report. The history is written to a file beside it.
        modules: Knows which module is running.
    """

    def __init__(
        self, torch: ModuleType, internals: Internals, journal: Journal, modules: Modules
    ) -> None:
        self._torch = torch
        self._memory = torch.cuda.memory
        self._internals = internals
        self._journal = journal
        self._modules = modules
        self._phases: list[tuple[int, str]] = []
        self._work: list[tuple[int, str, bool]] = []
        self._settled: list[tuple[int, int, str, str]] = []
        self._owners: dict[int, str] = {}
        self._sizes: dict[str, set[int]] = {}
        self._copy_bytes = 0
        self._optimizers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._passed: list[tuple[weakref.ref[Any], str, str]] = []
        self._standing_ns = 0
        self._before: Any = ()
        self._best = 0
        self._num_equal = 0
        self._since_ns = 0
        self._is_recording = False

    def begin(self) -> None:
        """Begin to record. Call it when the device has just been initialised."""
        self._restart()

    def phase(self, name: str) -> None:
        """Take note that a phase begins."""
        self._phases.append((time.time_ns(), name))

    def entered(self, path: str | None) -> None:
        """Take note that the running module has changed in forward."""
        self._work.append((time.time_ns(), path or "(loss)", self._modules.current is not None))
        if not self._copy_bytes and self._torch.is_autocast_enabled("cuda"):
            self._copy_bytes = self._torch.get_autocast_dtype("cuda").itemsize

    def forward_begins(self, root: Any, args: Any) -> None:
        """Take note of a model's parameters and of its inputs."""
        for path, module in root.named_modules():
            owner = self._modules.path_of(module) if path else f"({type(root).__name__})"
            for parameter in module.parameters(recurse=False):
                self._owners[id(parameter)] = owner
                self._sizes.setdefault(owner, set()).add(parameter.numel())
                self._settle(parameter, "parameters", owner)
            for buffer in module.buffers(recurse=False):
                self._settle(buffer, "buffers", owner)
        for leaf in self._internals.tensors(args):
            self._passed.append((weakref.ref(leaf), "inputs", "(batch)"))
            self._settle(leaf, "inputs", "(batch)")

    def forward_ends(self, output: Any) -> None:
        """Take note of the outputs. Hook every node of the graph, to note when it runs."""
        leaves = list(self._internals.tensors(output))
        for leaf in leaves:
            self._passed.append((weakref.ref(leaf), "activations", "(output)"))
            self._settle(leaf, "activations", "(output)")
        nodes = [leaf.grad_fn for leaf in leaves]
        seen = set(nodes)
        while nodes:
            node = nodes.pop()
            if node is None:
                continue
            if not hasattr(node, "variable"):
                path = self._modules.of_node(node) or "(loss)"
                node.register_prehook(self._noting(path))
            following = [child for child, _ in node.next_functions if child not in seen]
            seen.update(following)
            nodes += following

    def optimizer_begins(self, optimizer: Any) -> None:
        """Take note of the gradients."""
        self._optimizers.add(optimizer)
        self._settle_gradients(optimizer)

    def step_ends(self, optimizer: Any, *, peak_bytes: int, number: int) -> None:
        """Keep the ended step if no earlier one needed more memory. Then begin the next step."""
        self._settle_state(optimizer)
        # Of the steps with the highest peak, the last one is shown, because memory grows until it.
        if peak_bytes >= self._best:
            self._num_equal = self._num_equal + 1 if peak_bytes == self._best else 0
            self._best = peak_bytes
            if self._num_equal <= _MAX_EQUAL_STEPS:
                self.keep(number)
        self._restart()

    def keep(self, number: int) -> None:
        """Write the record since the last step. It replaces the record of an earlier step.

        Args:
            number: The number of the step; 0 if the script has taken none.
        """
        if not self._is_recording:
            return
        snapshot = self._internals.history()
        for events in snapshot["device_traces"]:
            for event in events:
                event["frames"] = of_script(event.get("frames") or [])
        self._settle_kept()
        content = {
            "step": number,
            "since_ns": self._since_ns,
            "before": self._before,
            "phases": self._phases,
            "work": self._work,
            "settled": self._settled,
            "copies": self._copies(),
            "snapshot": snapshot,
        }
        self._journal.write_beside(".history", pickle.dumps(content))

    def _restart(self) -> None:
        self._internals.record_history(clears=self._is_recording)
        self._is_recording = True
        self._before = self._memory.memory_snapshot()
        self._since_ns = time.time_ns()
        self._phases, self._work, self._settled = [], [], []
        # What a step leaves behind may be freed in the next one, and is not seen there.
        for optimizer in self._optimizers:
            self._settle_gradients(optimizer)
            self._settle_state(optimizer)
        for reference, role, module in self._passed:
            if (tensor := reference()) is not None:
                self._settle(tensor, role, module)
        self._passed = []
        self._standing_ns = time.time_ns()

    def _settle_gradients(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    owner = self._owners.get(id(parameter), "(optimizer)")
                    self._settle(parameter.grad, "gradients", owner)

    def _settle_state(self, optimizer: Any) -> None:
        for parameter, state in optimizer.state.items():
            owner = self._owners.get(id(parameter), "(optimizer)")
            for leaf in self._internals.tensors(state):
                self._settle(leaf, "optimizer_state", owner)

    def _settle_kept(self) -> None:
        """Take note of all other tensors that were there before the step and still are.

        An average of the weights is such a tensor, or a second model. What was there and has no
        tensor belongs to a library.
        """
        kinds = (self._torch.Tensor, self._torch.nn.Parameter)
        known = {address for _, address, _, _ in self._settled}
        addresses = {
            one.untyped_storage().data_ptr()
            for one in gc.get_objects()
            if type(one) in kinds and one.is_cuda and one.layout is self._torch.strided
        }
        self._settled += [
            (self._standing_ns, address, "buffers", _KEPT) for address in addresses - known
        ]

    def _copies(self) -> dict[str, list[int]]:
        """Return the bytes that autocast's copies of each module's parameters have."""
        return {
            owner: [-(-size * self._copy_bytes // _BLOCK_BYTES) * _BLOCK_BYTES for size in sizes]
            for owner, sizes in self._sizes.items()
            if self._copy_bytes
        }

    def _noting(self, path: str) -> Any:
        def note(_gradients: Any) -> None:
            self._work.append((time.time_ns(), path, False))

        return note

    def _settle(self, tensor: Any, role: str, module: str) -> None:
        # The memory of a sharded tensor is that of its local shard.
        tensor = getattr(tensor, "_local_tensor", tensor)
        if not tensor.is_cuda:
            return
        address = tensor.untyped_storage().data_ptr()
        if address:
            self._settled.append((time.time_ns(), address, role, module))
