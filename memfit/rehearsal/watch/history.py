"""Records one step's allocations with torch's own recorder, and notes that tell them apart.

Tensors are noted by their addresses, so no tensor of the script is kept alive.
`memfit.profiling.rehearsed` reads the file.
"""

from __future__ import annotations

import pickle
import time
from types import ModuleType
from typing import Any

from .internals import Internals
from .journal import Journal
from .modules import Modules

__all__ = ["History"]

_MAX_EQUAL_STEPS = 4


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
        self._memory = torch.cuda.memory
        self._internals = internals
        self._journal = journal
        self._modules = modules
        self._phases: list[tuple[int, str]] = []
        self._work: list[tuple[int, str, bool]] = []
        self._settled: list[tuple[int, int, str, str]] = []
        self._owners: dict[int, str] = {}
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

    def forward_begins(self, root: Any, args: Any) -> None:
        """Take note of a model's parameters and of its inputs."""
        for path, module in root.named_modules():
            owner = self._modules.path_of(module) if path else f"({type(root).__name__})"
            for parameter in module.parameters(recurse=False):
                self._owners[id(parameter)] = owner
                self._settle(parameter, "parameters", owner)
            for buffer in module.buffers(recurse=False):
                self._settle(buffer, "buffers", owner)
        for leaf in self._internals.tensors(args):
            self._settle(leaf, "inputs", "(batch)")

    def forward_ends(self, output: Any) -> None:
        """Hook every node of the graph, so that the time at which it runs is noted."""
        nodes = [leaf.grad_fn for leaf in self._internals.tensors(output)]
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
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    owner = self._owners.get(id(parameter), "(optimizer)")
                    self._settle(parameter.grad, "gradients", owner)

    def step_ends(self, optimizer: Any, *, peak_bytes: int, number: int) -> None:
        """Keep the ended step if no earlier one needed more memory. Then begin the next step."""
        for parameter, state in optimizer.state.items():
            owner = self._owners.get(id(parameter), "(optimizer)")
            for leaf in self._internals.tensors(state):
                self._settle(leaf, "optimizer_state", owner)
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
        content = {
            "step": number,
            "since_ns": self._since_ns,
            "before": self._before,
            "phases": self._phases,
            "work": self._work,
            "settled": self._settled,
            "snapshot": snapshot,
        }
        self._journal.write_beside(".history", pickle.dumps(content))

    def _restart(self) -> None:
        self._internals.record_history(clears=self._is_recording)
        self._is_recording = True
        self._before = self._memory.memory_snapshot()
        self._since_ns = time.time_ns()
        self._phases, self._work, self._settled = [], [], []

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
