"""The allocator's options are read from PyTorch's environment variables."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from memfit.errors import UsageError
from memfit.simulation.allocator.blocks import BlockOrder
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.units import GIB, MIB


def test_reads_the_first_variable_that_is_set() -> None:
    """The CUDA variable is read before the general one, as in torch."""
    both = {
        "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    read = functools.partial(AllocatorSettings.from_environment, torch_release=(2, 11))
    usual = AllocatorSettings(block_order=BlockOrder.ADDRESS)
    assert read(both) == dataclasses.replace(usual, max_split_size_bytes=128 * MIB)
    del both["PYTORCH_CUDA_ALLOC_CONF"]
    assert read(both).expandable_segments
    assert read({}) == usual


def test_reads_all_that_changes_bytes() -> None:
    """Every option is read, with spaces, a list, and options that do not change bytes."""
    text = (
        "max_split_size_mb: 100, garbage_collection_threshold:0.5,"
        "roundup_power2_divisions:[64:8,256:4,>:2], pinned_use_background_threads:True,"
        "max_non_split_rounding_mb:32, large_segment_size_mb:40, backend:native,"
        "per_process_memory_fraction:0.5"
    )
    settings = AllocatorSettings.parse(text)
    assert settings.max_split_size_bytes == 100 * MIB
    assert settings.max_non_split_rounding_bytes == 32 * MIB
    assert settings.large_segment_bytes == 40 * MIB
    assert settings.memory_fraction == 0.5
    assert settings.garbage_collection_threshold == 0.5
    sizes = (MIB, 64 * MIB, 256 * MIB, 512 * MIB, 100 * GIB)
    assert [settings.divisions_at(size) for size in sizes] == [8, 8, 4, 2, 2]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("max_split_size_mb:20", "must be more than 20"),
        ("max_split:200", "no option 'max_split'; did you mean 'max_split_size_mb'"),
        ("expandable_segments:yes", "'yes' is not a value for expandable_segments"),
        ("expandable_segments", "not of the form option:value"),
        ("garbage_collection_threshold:1.5", "between 0 and 1"),
        ("roundup_power2_divisions:3", "'3' is not a value"),
        ("backend:cudaMallocAsync", "models 'native'"),
        ("per_process_memory_fraction:0", "above 0"),
    ],
)
def test_refuses_what_torch_refuses(text: str, sentence: str) -> None:
    """The message has the value and a valid one."""
    with pytest.raises(UsageError, match=sentence):
        AllocatorSettings.parse(text)
