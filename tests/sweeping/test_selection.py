"""Which models are meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

from memfit.errors import UnknownModelError, UsageError
from memfit.sweeping.selection import Selected, family_of, select


def test_names_wildcards_and_sizes() -> None:
    """They come in the order in which they were given, each once."""
    found = select(["resnet18@320x240", "test_vit*", "test_vit", "resnet18@64"])
    vits = [Selected(name) for name in timm.list_models("test_vit*")]
    assert found == (
        Selected("resnet18", (320, 240)),
        *vits,
        Selected("resnet18", (64, 64)),
    )


def test_all_is_all_of_timm() -> None:
    """An image size goes to every model."""
    found = select("all@96")
    assert [model.name for model in found] == timm.list_models()
    assert {model.image_size for model in found} == {(96, 96)}


def test_a_file_has_a_pattern_a_line(tmp_path: Path) -> None:
    """Comments and empty lines are skipped."""
    path = tmp_path / "models.txt"
    path.write_text("# mine\nresnet18\n\n  test_vit \n")
    assert select([str(path)]) == (Selected("resnet18"), Selected("test_vit"))


@pytest.mark.parametrize(
    ("pattern", "error", "words"),
    [
        ("resnet1", UnknownModelError, "did you mean"),
        ("resnet_none*", UnknownModelError, "No model of timm .* matches 'resnet_none\\*'"),
        ("nowhere.txt", UsageError, "nowhere.txt cannot be read as a list of models"),
        ("resnet18@big", UsageError, "'big' is not an image size"),
    ],
)
def test_mistakes(pattern: str, error: type[UsageError], words: str) -> None:
    """Each has one sentence."""
    with pytest.raises(error, match=words):
        select([pattern])


def test_nothing_is_refused(tmp_path: Path) -> None:
    """So is a file without names."""
    with pytest.raises(UsageError, match="No model was named"):
        select([])
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    with pytest.raises(UsageError, match="names no model"):
        select([str(empty)])


def test_the_family_is_timms_module() -> None:
    """The tag of weights does not matter."""
    assert family_of("convnext_tiny.fb_in1k") == "convnext"
    assert family_of("resnet18") == "resnet"
