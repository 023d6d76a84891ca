"""The catalogue of cards."""

from __future__ import annotations

import pytest

from memfit.cards import COMMON_GPUS, catalogue, each_once, find_gpu
from memfit.errors import UsageError
from memfit.units import GIB, MIB


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("rtx3090", "NVIDIA GeForce RTX 3090"),
        ("RTX 3090", "NVIDIA GeForce RTX 3090"),
        ("3090", "NVIDIA GeForce RTX 3090"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"),
        ("T4", "Tesla T4"),
        ("mi300x", "AMD Instinct MI300X"),
    ],
)
def test_finds_by_any_name(name: str, found: str) -> None:
    """This may be the name as torch prints it or an alias, with spaces or without."""
    assert find_gpu(name).name == found


def test_a_card_with_two_names_is_one_card() -> None:
    """The order is the caller's, and so are the names."""
    assert each_once(["t4", "rtx3090", "Tesla T4", "3090"]) == ("t4", "rtx3090")


def test_unknown_name_suggests_the_nearest() -> None:
    """The message says which card was probably meant, as it can be typed."""
    with pytest.raises(UsageError, match=r"no GPU 'rtx3091'.*did you mean rtx3090 or "):
        find_gpu("rtx3091")


def test_memory_overrides_and_capacity_alone() -> None:
    """A size replaces the catalogue's, and `any` needs a size."""
    assert find_gpu("3090", total_bytes=20 * GIB).total_bytes == 20 * GIB
    assert find_gpu("any", total_bytes=6 * GIB).total_bytes == 6 * GIB
    with pytest.raises(UsageError, match="no memory size of its own"):
        find_gpu("any")
    with pytest.raises(UsageError, match=r"^100 MiB are less than a process without tensors"):
        find_gpu("3090", total_bytes=100 * MIB)


def test_every_card_is_whole() -> None:
    """Each card has a source, a plausible context, and a unique name."""
    cards = catalogue()
    assert len({card.name for card in cards}) == len(cards)
    for card in cards:
        assert card.source
        assert 100 * MIB < card.context_bytes < GIB
        assert card.usable_bytes > 0
        assert card.blas_workspace_bytes() >= 8 * MIB
        assert card.context_origin == "band" or card.context_origin.startswith("measured: ")
    assert {find_gpu(name).name for name in COMMON_GPUS} == set(COMMON_GPUS)


def test_estimated_contexts_lie_in_their_range() -> None:
    """Only an estimate from NVIDIA's cards has a range, and the estimate is inside it."""
    for card in catalogue():
        held = card.context_range_bytes
        assert (held is None) == (card.context_origin != "band" or card.vendor == "AMD")
        assert held is None or held[0] < card.context_bytes < held[1]
    assert find_gpu("any", total_bytes=8 * GIB).context_range_bytes is not None


def test_what_a_card_decides() -> None:
    """From Ampere on there is bf16. BLAS workspaces depend on the card and on torch's release."""
    assert not find_gpu("t4").has_bf16
    assert find_gpu("a100").has_bf16
    assert find_gpu("a100").blas_workspace_bytes() == 8_519_680
    assert find_gpu("h100").blas_workspace_bytes() == 32 * MIB
    assert find_gpu("h100").blas_workspace_bytes((2, 8)) == 32 * MIB
    assert find_gpu("rtx5090").blas_workspace_bytes((2, 8)) == 8_519_680
    assert find_gpu("rtx5090").blas_workspace_bytes((2, 15)) == 32 * MIB
    assert find_gpu("mi300x").blas_workspace_bytes() == 128 * MIB
