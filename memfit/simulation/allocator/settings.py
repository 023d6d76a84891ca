"""Reads the options of PyTorch's CUDA caching allocator from its environment variables.

Some options change how many bytes are allocated. Other options (pinned host memory, locks,
recording) do not. Those are accepted and have no effect here.
`memfit.simulation.allocator.caching` does what the options say.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping

from memfit.errors import UsageError
from memfit.simulation.allocator.blocks import BlockOrder
from memfit.units import MIB

__all__ = ["AllocatorSettings"]

ENVIRONMENT_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""The variables that hold the settings. The first one that is set counts.

Source: `CUDAAllocatorConfig::instance` in torch/include/c10/cuda/CUDAAllocatorConfig.h.
"""

_NUM_ROUNDUP_INTERVALS = 16  # 1 MiB, 2 MiB, ... up to and beyond 32 GiB
_LARGE_SEGMENT_BYTES = 20 * MIB
_NO_EFFECT_ON_BYTES = frozenset(
    {
        "release_lock_on_cudamalloc",
        "release_lock_on_hipmalloc",
        "pinned_use_cuda_host_register",
        "pinned_use_hip_host_register",
        "pinned_num_register_threads",
        "pinned_use_background_threads",
        "pinned_reserve_segment_size_mb",
        "pinned_max_round_threshold_mb",
        "pinned_max_cached_size_mb",
        "pinned_free_catch_all",
        "graph_capture_record_stream_reuse",
        "throw_on_cudamalloc_oom",
        "expandable_segments_reserve",
        "expandable_segments_reserve_by_class",
    }
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorSettings:
    """Options of the caching allocator.

    Args:
        expandable_segments: One growing segment per pool instead of one per allocation.
        max_split_size_bytes: Blocks of this size and above are not split; `None` if all blocks are
            split.
        max_non_split_rounding_bytes: The block that serves a request of at least
            `max_split_size_bytes` may be larger than the request by at most this much.
        large_segment_bytes: The size of a segment that serves requests of 1 to 10 MiB.
        roundup_power2_divisions: One number for each power of two, from 1 MiB on. It says into how
            many steps the sizes up to the next power of two are divided. With a number below 2,
            sizes are rounded to 512 B.
        garbage_collection_threshold: The share of a capped capacity above which unused blocks are
            given back; `None` if they never are. As in PyTorch, this works only if the process's
            share of the device is capped.
        memory_fraction: The share of the device that the process may use; `None` for all of it.
        block_order: Which of the free blocks of one size is taken. It is no option: the release of
            torch decides it.

    Source: torch/include/c10/core/AllocatorConfig.h (defaults and names) and
        docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf.
    """

    expandable_segments: bool = False
    max_split_size_bytes: int | None = None
    max_non_split_rounding_bytes: int = _LARGE_SEGMENT_BYTES
    large_segment_bytes: int = _LARGE_SEGMENT_BYTES
    roundup_power2_divisions: tuple[int, ...] = (0,) * _NUM_ROUNDUP_INTERVALS
    garbage_collection_threshold: float | None = None
    memory_fraction: float | None = None
    block_order: BlockOrder = BlockOrder.SEGMENT

    def __post_init__(self) -> None:
        """Refuse the values that PyTorch refuses."""
        smallest = self.large_segment_bytes
        if self.max_split_size_bytes is not None and self.max_split_size_bytes <= smallest:
            raise UsageError(
                f"max_split_size_mb must be more than {smallest // MIB}, not "
                f"{self.max_split_size_bytes // MIB}."
            )
        threshold = self.garbage_collection_threshold
        if threshold is not None and not 0 < threshold < 1:
            raise UsageError(
                f"garbage_collection_threshold must be between 0 and 1, not {threshold}."
            )
        if self.memory_fraction is not None and not 0 < self.memory_fraction <= 1:
            raise UsageError(
                f"per_process_memory_fraction must be above 0 and at most 1, not "
                f"{self.memory_fraction}."
            )

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str], *, torch_release: tuple[int, int]
    ) -> AllocatorSettings:
        """Read the settings of a process with these environment variables.

        Args:
            environment: Variables by name, such as `os.environ`.
            torch_release: The major and minor version of torch.

        Raises:
            UsageError: PyTorch would not accept the value of a variable.
        """
        for variable in ENVIRONMENT_VARIABLES:
            if variable in environment:
                found = cls.parse(environment[variable], where=variable)
                break
        else:
            found = cls()
        return dataclasses.replace(found, block_order=BlockOrder.of(torch_release))

    @classmethod
    def parse(cls, text: str, *, where: str = "the allocator's settings") -> AllocatorSettings:
        """Read settings such as `"expandable_segments:True,max_split_size_mb:128"`.

        Args:
            text: Options in PyTorch's format.
            where: The name of the text in an error.

        Raises:
            UsageError: An option is unknown, or its value is not valid.
        """
        fields: dict[str, object] = {}
        for key, value in _options(text, where):
            reader = _READERS.get(key)
            try:
                if reader is not None:
                    field, read = reader
                    fields[field] = read(value)
                elif key == "backend":
                    _check_backend(value)
                elif key not in _NO_EFFECT_ON_BYTES:
                    known = sorted((*_READERS, "backend", *_NO_EFFECT_ON_BYTES))
                    near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
                    raise UsageError(f"{where} has no option {key!r}; did you mean {near!r}?")
            except ValueError as error:
                if isinstance(error, UsageError):
                    raise
                raise UsageError(f"{where}: {value!r} is not a value for {key}.") from error
        return cls(**fields)  # type: ignore[arg-type]

    def divisions_at(self, num_bytes: int) -> int:
        """Return the number of steps in the interval that a size is in."""
        index = num_bytes.bit_length() - MIB.bit_length()
        return self.roundup_power2_divisions[min(max(index, 0), _NUM_ROUNDUP_INTERVALS - 1)]


def _options(text: str, where: str) -> list[tuple[str, str]]:
    """Split at the commas that are outside brackets."""
    options = []
    for option in re.split(r",(?![^\[]*\])", re.sub(r"\s", "", text)):
        if not option:
            continue
        key, colon, value = option.partition(":")
        if not colon or not value:
            raise UsageError(f"{where}: {option!r} is not of the form option:value.")
        options.append((key, value))
    return options


def _check_backend(value: str) -> None:
    if value != "native":
        raise UsageError(
            f"The allocator backend {value!r} is not simulated: memfit models 'native'."
        )


def _read_bool(value: str) -> bool:
    if value not in {"True", "False"}:
        raise ValueError(value)
    return value == "True"


def _read_mib(value: str) -> int:
    return int(value) * MIB


def _read_divisions(value: str) -> tuple[int, ...]:
    """Read one number, or `[256:1,512:2,>:4]` with interval starts in MiB."""
    if not value.startswith("["):
        return (_power_of_two(value),) * _NUM_ROUNDUP_INTERVALS
    divisions = [0] * _NUM_ROUNDUP_INTERVALS
    last = None
    for part in value.strip("[]").split(","):
        start, _, count = part.partition(":")
        if start == ">":
            begin = 0 if last is None else last + 1
            divisions[begin:] = [_power_of_two(count)] * (_NUM_ROUNDUP_INTERVALS - begin)
            continue
        index = min(_power_of_two(start).bit_length() - 1, _NUM_ROUNDUP_INTERVALS - 1)
        if last is None:
            divisions[:index] = [_power_of_two(count)] * index
        divisions[index] = _power_of_two(count)
        last = index
    return tuple(divisions)


def _power_of_two(text: str) -> int:
    number = int(text)
    if number < 1 or number & (number - 1):
        raise ValueError(text)
    return number


_READERS: dict[str, tuple[str, Callable[[str], object]]] = {
    "expandable_segments": ("expandable_segments", _read_bool),
    "max_split_size_mb": ("max_split_size_bytes", _read_mib),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _read_mib),
    "large_segment_size_mb": ("large_segment_bytes", _read_mib),
    "roundup_power2_divisions": ("roundup_power2_divisions", _read_divisions),
    "garbage_collection_threshold": ("garbage_collection_threshold", float),
    "per_process_memory_fraction": ("memory_fraction", float),
}
