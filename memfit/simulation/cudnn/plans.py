"""Asks cuDNN which plan it takes for a convolution, and what workspace the plan needs.

cuDNN 9.8 and later choose plans for a card that is described and not there. torch takes the first
plan of the heuristics that can be built. `cudnn.benchmark` tries several plans with a workspace
that is large enough for all of them.

Source: aten/src/ATen/native/cudnn/Conv_v8.cpp (which plans torch asks for, leaves out and tries);
"deviceless ahead-of-time compilation" in the documentation of cuDNN's frontend.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

from memfit.simulation.cudnn.questions import Convolution, ConvolutionKernel

__all__ = ["ANY_QUESTION", "CudnnPlans", "PlanSettings", "cudnn_plans", "missing_cudnn"]

_FIRST_VERSION: Final = 90800
_PACKAGE: Final = "cudnn"
# What cuDNN wants to know about a card. For 72 convolutions, only `deviceVer` (the compute
# capability) changed plans and workspaces. So the other values are those of one card.
_SOME_CARD: Final[dict[str, Any]] = {
    "multiProcessorCount": 82,
    "warpSize": 32,
    "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 101376,
    "reservedSharedMemoryPerBlock": 1024,
    "maxRegistersPerSM": 65536,
    "maxCtasPerSM": 16,
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 1536,
    "regsPerBlock": 65536,
    "totalGlobalMem": 24 * 2**30,
    "smClockRateKHz": 1_695_000,
    "l2CacheSize": 6 * 2**20,
    "maxBlockSize": [1024, 1024, 64],
    "memClockRateKHz": 9_751_000,
    "maxGridSize": [2**31 - 1, 65535, 65535],
    "supportCoopLaunch": 1,
    "pciDeviceId": 0,
    "isTccDriver": 0,
    "cudaDeviceId": 0,
    "driverVer": 13020,
    "deviceName": "GPU",
}
_DTYPES: Final = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BFLOAT16"}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """The settings of torch that leave plans out.

    Args:
        allows_tf32: `torch.backends.cudnn.allow_tf32`.
        is_deterministic: `torch.backends.cudnn.deterministic`.
        benchmark_limit: `torch.backends.cudnn.benchmark_limit`; 0 for no limit.
    """

    allows_tf32: bool = True
    is_deterministic: bool = False
    benchmark_limit: int = 10

    @classmethod
    def current(cls) -> PlanSettings:
        """Return those of this process."""
        cudnn = torch.backends.cudnn
        return cls(
            allows_tf32=cudnn.allow_tf32,
            is_deterministic=cudnn.deterministic,
            benchmark_limit=cudnn.benchmark_limit or 0,
        )

    @property
    def text(self) -> str:
        """All fields, as part of a file's name."""
        return f"tf32-{self.allows_tf32:d}-det-{self.is_deterministic:d}-{self.benchmark_limit}"


@functools.cache
def missing_cudnn() -> str | None:
    """Say why cuDNN cannot be asked.

    Returns:
        The reason, as the end of a sentence; `None` if it can be asked.
    """
    if torch.version.cuda is None:
        return "this torch was not built for CUDA"
    if importlib.util.find_spec(_PACKAGE) is None:
        return "nvidia-cudnn-frontend is not installed (pip install 'memfit[cudnn]')"
    try:
        version = importlib.import_module(_PACKAGE).backend_version()
    except Exception as exc:  # noqa: BLE001 - it loads libraries, and anything may be wrong there
        return f"cuDNN's frontend does not load ({exc})".splitlines()[0]
    if version < _FIRST_VERSION:
        return f"cuDNN is older than 9.8 ({version})"
    return None


def cudnn_plans(
    compute_capability: tuple[int, int], settings: PlanSettings | None = None
) -> CudnnPlans | None:
    """Return what answers for a card.

    Args:
        compute_capability: The compute capability of the card, such as (8, 6).
        settings: What leaves plans out; `None` for the settings of this process.

    Returns:
        What answers; `None` if cuDNN cannot be asked.
    """
    if missing_cudnn() is not None:
        return None
    return CudnnPlans(compute_capability, settings or PlanSettings.current())


class CudnnPlans:
    """The plans of the installed cuDNN for one compute capability.

    Args:
        compute_capability: Such as (8, 6).
        settings: What leaves plans out.
    """

    def __init__(self, compute_capability: tuple[int, int], settings: PlanSettings) -> None:
        self.settings = settings
        self._cudnn = importlib.import_module(_PACKAGE)
        self._capability = compute_capability
        # The question whose plans were last asked for by rank, the rest of them, and their answers.
        self._ranked: tuple[Convolution, Iterator[int], list[int]] | None = None

    @property
    def version(self) -> int:
        """The version of cuDNN, such as 92600."""
        return int(self._cudnn.backend_version())

    @functools.cached_property
    def _properties(self) -> Any:
        major, minor = self._capability
        properties = {**_SOME_CARD, "deviceVer": 100 * major + 10 * minor}
        return self._cudnn.create_device_properties(json.dumps(properties))

    @functools.cached_property
    def _new_graph(self) -> Callable[..., Any]:
        """What makes a graph: the frontend's compiled class, or its class in Python.

        Newer frontends have the latter. It makes the former, and takes as much time again.
        """
        compiled = getattr(self._cudnn, "_pybind_module", None)
        made: Callable[..., Any] = getattr(compiled, "backend_graph", self._cudnn.pygraph)
        return made

    def workspace_bytes(self, convolution: Convolution) -> int | None:
        """Return the workspace of the plan that is taken, or of the largest plan that is tried.

        Args:
            convolution: The question.

        Returns:
            Bytes; `None` if cuDNN has no plan.
        """
        heuristics, fallback = self._cudnn.heur_mode.A, self._cudnn.heur_mode.FALLBACK
        if convolution.tries_plans:
            tried = self._workspaces(convolution, [[heuristics, fallback]])
            limit = self.settings.benchmark_limit or None
            return max(itertools.islice(tried, limit), default=None)
        # Making a list takes most of the time. torch takes the first plan of both lists, so the
        # second list is made only if the first one has no plan.
        if not convolution.rank:
            return next(self._workspaces(convolution, [[heuristics], [fallback]]), None)
        # Where a workspace finds no room, the next ranks are asked for one after another.
        asked = dataclasses.replace(convolution, rank=0)
        if self._ranked is None or self._ranked[0] != asked:
            self._ranked = (asked, self._workspaces(asked, [[heuristics], [fallback]]), [])
        _, plans, found = self._ranked
        found += itertools.islice(plans, max(0, convolution.rank + 1 - len(found)))
        return found[convolution.rank] if convolution.rank < len(found) else None

    def _workspaces(self, convolution: Convolution, lists: list[list[Any]]) -> Iterator[int]:
        """Yield the workspace of each plan that can be built, in the order of the lists."""
        for modes in lists:
            try:
                graph = self._graph(convolution, modes)
                count = graph.get_execution_plan_count()
            except (self._cudnn.cudnnGraphNotSupportedError, RuntimeError) as exc:
                _log.debug("cuDNN has no plan for %s: %s", convolution.text, exc)
                continue
            for index in range(count):
                num_bytes = self._built(graph, index)
                if num_bytes is not None:
                    yield num_bytes

    def _built(self, graph: Any, index: int) -> int | None:
        try:
            graph.build_plan_at_index(index)
        except (self._cudnn.cudnnGraphNotSupportedError, RuntimeError):
            return None
        return int(graph.get_workspace_size_plan_at_index(index))

    def _graph(self, convolution: Convolution, modes: list[Any]) -> Any:
        """Return the graph of one convolution, with its plans in the order of the heuristics."""
        cudnn = self._cudnn
        dtype = getattr(cudnn.data_type, _DTYPES[convolution.dtype])
        graph = self._new_graph(
            io_data_type=dtype,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            device_property=self._properties,
        )
        is_last = convolution.is_channels_last

        def tensor(name: str, shape: tuple[int, ...]) -> Any:
            strides = _strides(shape, is_last=is_last)
            return graph.tensor(name=name, dim=list(shape), stride=strides, data_type=dtype)

        geometry = {
            "padding": list(convolution.padding),
            "stride": list(convolution.stride),
            "dilation": list(convolution.dilation),
        }
        if convolution.kernel is ConvolutionKernel.FORWARD:
            made, shape = (
                graph.conv_fprop(
                    image=tensor("x", convolution.input_shape),
                    weight=tensor("w", convolution.weight_shape),
                    **geometry,
                ),
                convolution.output_shape,
            )
        elif convolution.kernel is ConvolutionKernel.DATA:
            made, shape = (
                graph.conv_dgrad(
                    loss=tensor("y", convolution.output_shape),
                    filter=tensor("w", convolution.weight_shape),
                    **geometry,
                ),
                convolution.input_shape,
            )
        else:
            made, shape = (
                graph.conv_wgrad(
                    image=tensor("x", convolution.input_shape),
                    loss=tensor("y", convolution.output_shape),
                    **geometry,
                ),
                convolution.weight_shape,
            )
        made.set_output(True).set_dim(list(shape)).set_stride(_strides(shape, is_last=is_last))
        made.set_data_type(dtype)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans(modes)
        left_out = []
        if convolution.dtype == "float32":
            left_out.append(cudnn.numerical_note.DOWN_CONVERT_INPUTS)
            if not self.settings.allows_tf32:
                left_out.append(cudnn.numerical_note.TENSOR_CORE)
        if self.settings.is_deterministic:
            left_out.append(cudnn.numerical_note.NONDETERMINISTIC)
        if left_out:
            graph.deselect_numeric_notes(left_out)
        return graph


def _strides(shape: tuple[int, ...], *, is_last: bool) -> list[int]:
    """Return strides in elements, the channels innermost or the last dimension innermost."""
    order = [0, *range(2, len(shape)), 1] if is_last else list(range(len(shape)))
    strides = [0] * len(shape)
    step = 1
    for dimension in reversed(order):
        strides[dimension] = step
        step *= shape[dimension]
    return strides


# A convolution for which cuDNN has a plan on every card that it knows.
ANY_QUESTION: Final = Convolution(
    kernel=ConvolutionKernel.FORWARD,
    dtype="float32",
    is_channels_last=False,
    input_shape=(1, 8, 8, 8),
    weight_shape=(8, 8, 1, 1),
    output_shape=(1, 8, 8, 8),
    padding=(0, 0),
    stride=(1, 1),
    dilation=(1, 1),
)
