"""cuDNN's backend API, called by ctypes: lists of plans for a card that is described and not there.

torch brings cuDNN along, so nothing else is installed for this. NVIDIA's frontend for Python always
fetches whole lists of plans, which takes ten times as long as the first plan alone.

Source: the numbers are those of cudnn_graph.h (NVIDIA, cuDNN backend API), where a descriptor of a
card's properties stands in for a handle since 9.8.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

__all__ = [
    "BACKWARD_DATA",
    "BACKWARD_FILTER",
    "FORWARD",
    "CudnnError",
    "Descriptors",
    "bring_driver_with",
    "finds_driver",
    "load_cudnn",
]

Role = tuple[int, int, int, int, int, int, int]
# The descriptor of an operation, and its attributes for x, w, y, the convolution, alpha and beta.
FORWARD: Final[Role] = (10, 704, 703, 705, 702, 700, 701)
BACKWARD_DATA: Final[Role] = (12, 710, 709, 711, 708, 706, 707)
BACKWARD_FILTER: Final[Role] = (11, 716, 715, 717, 714, 712, 713)

# cudnnBackendDescriptorType_t
_CONVOLUTION: Final = 1
_ENGINE: Final = 2
_CONFIG: Final = 3
_HEURISTICS: Final = 4
_PLAN: Final = 5
_KNOB_CHOICE: Final = 7
_GRAPH: Final = 15
_TENSOR: Final = 17
_CARD: Final = 38
# cudnnBackendAttributeType_t
_DATA_TYPE: Final = 1
_INT64: Final = 3
_FLOAT32: Final = 4
_CONVOLUTION_MODE: Final = 7
_HEURISTICS_MODE: Final = 8
_KNOB: Final = 9
_NOTE: Final = 11
_DESCRIPTOR: Final = 15
_BEHAVIOR: Final = 19
_INT32: Final = 23
_CHAR: Final = 24
_C_TYPES: Final[dict[int, Any]] = {
    _INT64: ctypes.c_int64,
    _FLOAT32: ctypes.c_float,
    _INT32: ctypes.c_int32,
    _DESCRIPTOR: ctypes.c_void_p,
    _CHAR: ctypes.c_char,
}
_FLOAT: Final = 0  # cudnnDataType_t
_CROSS_CORRELATION: Final = 1  # cudnnConvolutionMode_t
_ALIGNED_BYTES: Final = 16
_MOST_NOTES: Final = 16
_COMPILED: Final = 0  # cudnnBackendBehaviorNote_t
_MOST_KNOBS: Final = 40

Attribute = tuple[int, int, Sequence[object]]


class CudnnError(Exception):
    """cuDNN refuses a description: it has no plan for it."""


_DRIVER: Final = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_bring_driver: list[Callable[[], object]] = []


def bring_driver_with(function: Callable[[], object]) -> None:
    """Have a function called before cuDNN is asked in a process that finds no driver.

    Args:
        function: Loads a library with the driver's name, if it can.
    """
    _bring_driver[:] = [function]


@functools.cache
def finds_driver() -> bool:
    """Whether cuDNN finds a driver of CUDA in this process. It looks for it once.

    Without one it takes no plan whose kernels need a function of the driver, such as those of
    engine 5 of cuDNN 9.26, which a process on a GPU takes.
    """
    if _is_loadable():
        return True
    for bring in _bring_driver:
        bring()
    return _is_loadable()


def _is_loadable() -> bool:
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True


def load_cudnn() -> ctypes.CDLL:
    """Return the cuDNN that torch has loaded, with a driver for it to find.

    Raises:
        OSError: There is none.
    """
    import torch  # noqa: F401 - a torch for CUDA loads it

    finds_driver()
    library = ctypes.CDLL("cudnn64_9.dll" if sys.platform == "win32" else "libcudnn.so.9")
    library.cudnnGetVersion.restype = ctypes.c_size_t
    return library


class Descriptors:
    """The descriptors of one question, destroyed at the end of a `with` block.

    Args:
        library: cuDNN.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._made: list[ctypes.c_void_p] = []

    def __enter__(self) -> Descriptors:
        """Return the descriptors."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Destroy them, the last one first."""
        for made in reversed(self._made):
            self._library.cudnnBackendDestroyDescriptor(made)

    def card(self, properties: str) -> ctypes.c_void_p:
        """Describe a card.

        Args:
            properties: Its properties as JSON.
        """
        return self._make(_CARD, (2702, _CHAR, [bytes([char]) for char in properties.encode()]))

    def tensor(
        self, number: int, dtype: int, shape: Sequence[int], strides: Sequence[int]
    ) -> ctypes.c_void_p:
        """Describe a tensor.

        Args:
            number: Another one for each tensor of a graph.
            dtype: cuDNN's number for its type.
            shape: Its shape.
            strides: Its strides, in elements.
        """
        return self._make(
            _TENSOR,
            (900, _INT64, [_ALIGNED_BYTES]),
            (901, _DATA_TYPE, [dtype]),
            (902, _INT64, shape),
            (903, _INT64, strides),
            (906, _INT64, [number]),
        )

    def graph(
        self,
        role: Role,
        tensors: Sequence[ctypes.c_void_p],
        *,
        padding: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
    ) -> ctypes.c_void_p:
        """Describe a graph of one convolution, which computes in fp32.

        Args:
            role: `FORWARD`, `BACKWARD_DATA` or `BACKWARD_FILTER`.
            tensors: Input, weight and output, or the gradients in their place.
            padding: For each spatial dimension.
            stride: For each spatial dimension.
            dilation: For each spatial dimension.
        """
        convolution = self._make(
            _CONVOLUTION,
            (100, _DATA_TYPE, [_FLOAT]),
            (101, _CONVOLUTION_MODE, [_CROSS_CORRELATION]),
            (102, _INT64, dilation),
            (103, _INT64, stride),
            (104, _INT64, padding),
            (105, _INT64, padding),
            (106, _INT64, [len(padding)]),
        )
        kind, *names = role
        parts = [(_DESCRIPTOR, [part]) for part in (*tensors, convolution)]
        # The factors of the result, of torch's type. With factors in fp64 some plans are others.
        factors = [(_FLOAT32, [1.0]), (_FLOAT32, [0.0])]
        values: list[tuple[int, Sequence[object]]] = [*parts, *factors]
        attributes = [(name, *value) for name, value in zip(names, values, strict=True)]
        return self._make(_GRAPH, (801, _DESCRIPTOR, [self._make(kind, *attributes)]))

    def heuristics(
        self, graph: ctypes.c_void_p, card: ctypes.c_void_p, mode: int
    ) -> ctypes.c_void_p:
        """Let cuDNN choose plans.

        Args:
            graph: What to compute.
            card: The card.
            mode: cuDNN's number for the kind of list.
        """
        return self._make(
            _HEURISTICS,
            (201, _DESCRIPTOR, [graph]),
            (200, _HEURISTICS_MODE, [mode]),
            (204, _DESCRIPTOR, [card]),
        )

    def configs(self, heuristics: ctypes.c_void_p, num_most: int) -> list[ctypes.c_void_p]:
        """Return the first plans of a list, as configurations of engines.

        Args:
            heuristics: The list.
            num_most: How many at most. Each takes time.
        """
        made = [self._created(_CONFIG) for _ in range(num_most)]
        found = self._read(heuristics, 202, _DESCRIPTOR, made)
        return made[: len(found)]

    def notes(self, config: ctypes.c_void_p) -> frozenset[int]:
        """Return the numerical notes of a configuration's engine."""
        engine = self._engine_of(config)
        return frozenset(self._read(engine, 1303, _NOTE, [0] * _MOST_NOTES))

    def engine_number(self, config: ctypes.c_void_p) -> int:
        """Return the number of a configuration's engine."""
        (number,) = self._read(self._engine_of(config), 1301, _INT64, [0])
        return int(number)

    def knobs(self, config: ctypes.c_void_p) -> dict[int, int]:
        """Return the settings of a configuration, by the numbers of their kinds."""
        choices = [self._created(_KNOB_CHOICE) for _ in range(_MOST_KNOBS)]
        found = self._read(config, 302, _DESCRIPTOR, choices)
        return {
            int(self._read(choice, 600, _KNOB, [0])[0]): int(
                self._read(choice, 601, _INT64, [0])[0]
            )
            for choice in choices[: len(found)]
        }

    def retargeted(
        self,
        graph: ctypes.c_void_p,
        card: ctypes.c_void_p,
        engine: int,
        knobs: Mapping[int, int],
        multiprocessors: int,
    ) -> ctypes.c_void_p:
        """Configure an engine for some multiprocessors of a card.

        Args:
            graph: What to compute.
            card: The card.
            engine: The engine's number.
            knobs: Its settings, by the numbers of their kinds.
            multiprocessors: How many to use.

        Raises:
            CudnnError: The engine cannot do it so.
        """
        made = self._make(
            _ENGINE,
            (1300, _DESCRIPTOR, [graph]),
            (1301, _INT64, [engine]),
            (1306, _INT32, [multiprocessors]),
            (1307, _DESCRIPTOR, [card]),
        )
        choices = [
            self._make(_KNOB_CHOICE, (600, _KNOB, [kind]), (601, _INT64, [value]))
            for kind, value in knobs.items()
        ]
        return self._make(_CONFIG, (300, _DESCRIPTOR, [made]), (302, _DESCRIPTOR, choices))

    def workspace_bytes(self, config: ctypes.c_void_p, card: ctypes.c_void_p) -> int | None:
        """Return the workspace of a plan; `None` if the plan cannot be built.

        A plan whose engine is compiled at run time is not built, since that takes a second. Its
        workspace is what its configuration says.
        """
        if self._is_compiled_at_run_time(config):
            (num_bytes,) = self._read(config, 303, _INT64, [0])
            return int(num_bytes)
        plan = self._created(_PLAN)
        try:
            self._set(plan, (407, _DESCRIPTOR, [card]))
            self._set(plan, (401, _DESCRIPTOR, [config]))
            self._check(self._library.cudnnBackendFinalize(plan))
        except CudnnError:
            return None
        (num_bytes,) = self._read(plan, 402, _INT64, [0])
        return int(num_bytes)

    def _is_compiled_at_run_time(self, config: ctypes.c_void_p) -> bool:
        notes = self._read(self._engine_of(config), 1305, _BEHAVIOR, [0] * _MOST_NOTES)
        return _COMPILED in notes

    def _engine_of(self, config: ctypes.c_void_p) -> ctypes.c_void_p:
        engine = self._created(_ENGINE)
        self._read(config, 300, _DESCRIPTOR, [engine])
        return engine

    def _check(self, status: int) -> None:
        if status:
            raise CudnnError(f"cuDNN's status is {status}.")

    def _created(self, kind: int) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self._check(self._library.cudnnBackendCreateDescriptor(kind, ctypes.byref(made)))
        self._made.append(made)
        return made

    def _make(self, kind: int, *attributes: Attribute) -> ctypes.c_void_p:
        made = self._created(kind)
        for attribute in attributes:
            self._set(made, attribute)
        self._check(self._library.cudnnBackendFinalize(made))
        return made

    def _set(self, made: ctypes.c_void_p, attribute: Attribute) -> None:
        name, kind, values = attribute
        array = (_C_TYPES.get(kind, ctypes.c_int) * len(values))(*values)
        self._check(
            self._library.cudnnBackendSetAttribute(
                made, name, kind, ctypes.c_int64(len(values)), array
            )
        )

    def _read(
        self, made: ctypes.c_void_p, name: int, kind: int, values: Sequence[Any]
    ) -> list[Any]:
        """Return the values of an attribute. Descriptors are filled where they are."""
        plain = [value.value for value in values] if kind == _DESCRIPTOR else values
        array = (_C_TYPES.get(kind, ctypes.c_int) * len(plain))(*plain)
        count = ctypes.c_int64()
        self._check(
            self._library.cudnnBackendGetAttribute(
                made, name, kind, ctypes.c_int64(len(plain)), ctypes.byref(count), array
            )
        )
        return list(array[: count.value])
