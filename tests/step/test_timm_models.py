"""Some timm models make no training step; the message says why."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from memfit.errors import UnsupportedError, UsageError
from memfit.records import Precision, StepOptions
from memfit.step.timm_models import check_optimizer_name, timm_parts

META = torch.device("meta")
# The models of this release of timm that `benchmarks/zoo_traces.py` could not trace.
NOT_TRACED = json.loads((Path(__file__).parents[1] / "data" / "zoo-not-traced.json").read_text())


def options(num_classes: int | None = None) -> StepOptions:
    return StepOptions(precision=Precision.FP32, optimizer="sgd", num_classes=num_classes)


def test_what_of_timm_does_not_trace_is_less_than_a_hundredth() -> None:
    """The list is from `benchmarks/zoo_traces.py`; another release has another list."""
    if timm.__version__ != NOT_TRACED["timm"]:
        pytest.skip(f"the list was made with timm {NOT_TRACED['timm']}")
    names = timm.list_models()
    assert set(NOT_TRACED["not_traced"]) < set(names)
    assert len(NOT_TRACED["not_traced"]) < 0.01 * len(names)


@pytest.mark.parametrize("name", ["qwen3_vit_88m_enc", "gemma4_vit_167m_enc"])
def test_an_encoder_is_refused_with_what_to_do(name: str) -> None:
    """It has no classes to train, even if classes are asked for."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with pytest.raises(UsageError, match="no classifier by default"):
        timm_parts(name, options(), META)
    with pytest.raises(UsageError, match=NOT_TRACED["not_traced"][name]):
        timm_parts(name, options(1000), META)


def test_a_timm_that_is_too_old_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 1.0.12, timm cannot say what optimizers it has."""
    monkeypatch.delattr(timm.optim, "list_optimizers")
    with pytest.raises(UnsupportedError, match=r"needs timm 1\.0\.12 or later; .* is installed"):
        check_optimizer_name("adamw")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_vit"])
def test_images_of_broken_patches_are_refused(name: str) -> None:
    """This holds for models of one size and for models of any size."""
    asked = dataclasses.replace(options(10), image_size=(63, 64))
    with pytest.raises(UsageError, match=r"63 is not a multiple .* nearest is 48 or 64"):
        timm_parts(name, asked, META)


@pytest.mark.parametrize("image_size", [None, (384, 384)])
def test_a_models_own_image_size_is_taken(image_size: tuple[int, int] | None) -> None:
    """It may be no multiple of the patches; then the rest of the border is left out."""
    asked = dataclasses.replace(options(10), image_size=image_size)
    model, make_batch, _ = timm_parts("vit_so400m_patch14_siglip_gap_384", asked, META)
    images, _ = make_batch(2)
    assert model.to(META)(images).shape == (2, 10)


def test_feature_extractors_are_refused() -> None:
    """They return maps, and memfit knows no loss for them."""
    step = dataclasses.replace(options(), model_kwargs=(("features_only", True),))
    with pytest.raises(UsageError, match=r"features_only=True returns feature maps.*Workload"):
        timm_parts("test_resnet", step, META)


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        ("pretrained", True, r"are random.*leave out pretrained=True"),
        ("img_size", 64, r"takes images of any: give image_size"),
    ],
)
def test_keywords_that_memfit_has_another_way_for(keyword: str, value: Any, message: str) -> None:
    """Weights are random, and a model without a size of its own takes images of any size."""
    step = dataclasses.replace(options(), model_kwargs=((keyword, value),))
    with pytest.raises(UsageError, match=message):
        timm_parts("test_resnet", step, META)


def test_the_size_that_a_model_is_built_for_is_that_of_its_images() -> None:
    """The keyword of the model may come with or without the option; both must agree."""
    step = dataclasses.replace(options(), model_kwargs=(("img_size", 64),))
    _, batch_of, _ = timm_parts("test_vit", step, META)
    assert batch_of(2)[0].shape == (2, 3, 64, 64)
    with pytest.raises(UsageError, match=r"images of 32x32 and with img_size=64"):
        timm_parts("test_vit", dataclasses.replace(step, image_size=(32, 32)), META)
    broken = dataclasses.replace(options(), model_kwargs=(("img_size", 70),))
    with pytest.raises(UsageError, match="70 is not a multiple of"):
        timm_parts("test_vit", broken, META)
