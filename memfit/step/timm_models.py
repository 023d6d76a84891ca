"""timm's models and optimizers, by their names.

This module checks names, builds models with random weights, and makes batches for them. Nothing is
downloaded. Importing timm takes seconds, so it is imported when it is first needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it
from torch.optim import Optimizer

from memfit.errors import NotSimulatedError, UnknownModelError, UnsupportedError, UsageError
from memfit.memory.collector import collector_paused
from memfit.records import StepOptions
from memfit.step import packaged_optimizers
from memfit.step.unfilled import UnfilledWeights
from memfit.units import parse_count, parse_image_size

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "as_built",
    "check_model_name",
    "check_optimizer_name",
    "fused_attention",
    "image_size_of",
    "import_timm",
    "make_optimizer",
    "patches_of",
    "smaller_images",
    "split_images",
    "timm_parts",
    "uses_fused_attention",
]

_LEARNING_RATE = 1e-4
_LIKE = 0.75
# What these errors say is a sentence. Of a KeyError it is only the key.
_SAYS_ENOUGH = (TypeError, ValueError, RuntimeError, AssertionError)
_SMALL_SIDE = 64  # networks of convolutions still have 2 x 2 pixels in their last layer
_WEIGHT_DECAY = 0.01  # not zero, so that timm makes its two parameter groups


def make_optimizer(model: nn.Module, name: str, *, fused: bool = False) -> Optimizer:
    """Make an optimizer over a model's parameters as timm's training script does.

    An optimizer of another package (`memfit.step.packaged_optimizers`) gets the same two groups.

    Raises:
        NotSimulatedError: The model is on the meta device, and the optimizer needs a GPU.
        UsageError: timm cannot make the optimizer here.
    """
    if packaged_optimizers.is_packaged(name):
        if fused:
            raise UsageError(f"The optimizer {name} has kernels of its own: leave fused out.")
        groups = import_timm().optim.param_groups_weight_decay(model, _WEIGHT_DECAY)
        return packaged_optimizers.made(name, groups, model, learning_rate=_LEARNING_RATE)
    try:
        made: Optimizer = import_timm().optim.create_optimizer_v2(
            model,
            opt=name,
            lr=_LEARNING_RATE,
            weight_decay=_WEIGHT_DECAY,
            **({"fused": True} if fused else {}),
        )
    except TypeError as error:
        if "fused" not in str(error):
            raise
        raise UsageError(
            f"The optimizer {name!r} has no fused implementation; adam, adamw, sgd "
            "and adagrad have one."
        ) from error
    except (AssertionError, ImportError, NameError, RuntimeError) as error:
        # Optimizers of Apex and bitsandbytes need their package, and a GPU when they are made.
        why = f"timm cannot make it here ({str(error) or type(error).__name__})"
        if next(model.parameters()).is_meta:
            raise NotSimulatedError.because(f"The optimizer {name!r}", why) from error
        raise UsageError(f"The optimizer {name!r} cannot be tried: {why}.") from error
    return made


def import_timm() -> ModuleType:
    """Import timm and return it.

    Raises:
        UnsupportedError: The installed torchvision was built for another torch.
    """
    if "timm.optim" in sys.modules:
        # In a trace, the collector's state takes long to ask for.
        return sys.modules["timm"]
    try:
        with collector_paused(for_good=True):
            import timm
            import timm.optim
    except (RuntimeError, AttributeError, ImportError) as error:
        # First, operators of the other build are missing. At a second import, torchvision is only
        # half there.
        if "torchvision" not in str(error):
            raise
        raise UnsupportedError(
            f"The installed torchvision was not built for torch {torch.__version__}, "
            "so timm cannot be imported. Install both from the same place: `pip "
            "install --upgrade torch torchvision`."
        ) from error
    return cast("ModuleType", timm)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _not_of_timm(name: str) -> str:
    """Say how to use a model that is not from timm, if the name is not close to any of timm's."""
    if difflib.get_close_matches(name, import_timm().list_models(), n=1, cutoff=_LIKE):
        return ""
    return (
        " For a model that is not timm's, give a memfit.Workload in Python, or "
        "rehearse its script: memfit rehearse --gpu NAME -- python train.py."
    )


def check_model_name(name: str) -> None:
    """Refuse a name that no timm model has.

    Raises:
        UnknownModelError: timm has no such model. The message gives the nearest names.
    """
    timm = import_timm()
    if name.endswith(".py"):
        raise UnknownModelError(
            f"{name!r} is a script and no model: rehearse it, with memfit rehearse --gpu NAME -- "
            f"python {name}."
        )
    if ":" in name or "/" in name:
        own = re.split("[:/]", name)[-1]
        known = timm.is_model(own.partition(".")[0])
        instead = (
            f"; did you mean {own}?"
            if known
            else (". Give the name of an architecture from timm.list_models().")
        )
        raise UnknownModelError(
            f"{name!r} is on a hub or on a disk, and memfit downloads nothing{instead}"
        )
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UnknownModelError(
            f"timm {timm.__version__} has no model {name!r}"
            f"{_nearest(architecture, timm.list_models()) or '.'}{_not_of_timm(architecture)}"
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        near = _nearest(tag, tags) or f"; it has {', '.join(tags) or 'none'}."
        raise UnknownModelError(f"{architecture} has no pretrained weights {tag!r}{near}")


def check_optimizer_name(name: str) -> None:
    """Refuse a name that no optimizer of timm's, bitsandbytes' or torchao's has.

    Raises:
        UsageError: There is no such optimizer, or its package is not installed. The message gives
            the nearest names.
        UnsupportedError: timm is too old to say what optimizers it has.
    """
    packaged_optimizers.check_package(name)
    if packaged_optimizers.is_packaged(name):
        return
    timm = import_timm()
    if not hasattr(timm.optim, "list_optimizers"):
        raise UnsupportedError(
            f"memfit needs timm 1.0.12 or later; {timm.__version__} is installed."
        )
    known = timm.optim.list_optimizers()
    if name.removeprefix("lookahead_") not in known:
        near = packaged_optimizers.without_package(name) or _nearest(name, known)
        raise UsageError(f"timm has no optimizer {name!r}{near or '.'}")


def image_size_of(name: str) -> tuple[int, int] | None:
    """Return the height and width of the images that a model is made for, as timm gives them.

    Args:
        name: The model's name.

    Returns:
        Height and width in pixels; `None` if timm does not give them.
    """
    config = import_timm().models.get_pretrained_cfg(name)
    if config is None or not config.input_size:
        return None
    _, height, width = config.input_size
    return height, width


def as_built(name: str, options: StepOptions) -> StepOptions:
    """Return the options with an image size that was given in either of two ways in both.

    Args:
        name: The model's name.
        options: The step's options.

    Returns:
        Options with the image size and, for a model that is built for one size, its argument
        `img_size`. They are unchanged for the model's own size.

    Raises:
        UsageError: The two ways differ, or one of them is no image size.
    """
    size = _image_size_asked(name, options)
    if size is None:
        return options
    kwargs = dict(options.model_kwargs)
    config = import_timm().models.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        # Only models that are built for one image size take this. Other models take any size.
        height, width = size
        kwargs["img_size"] = height if height == width else size
    return dataclasses.replace(options, image_size=size, model_kwargs=tuple(kwargs.items()))


def timm_parts(
    name: str, options: StepOptions, device: torch.device
) -> tuple[nn.Module, Callable[[int], Any], Callable[..., torch.Tensor]]:
    """Build the parts of a training step of a timm model.

    Args:
        name: The model's name. Its weights are random, and nothing is downloaded.
        options: The step's options.
        device: The device on which batches are made. For `meta`, the model is made there too.

    Returns:
        The model in training mode, a function from a batch size to images of shape
        (samples, channels, height, width) and classes of shape (samples,), and the loss.

    Raises:
        UsageError: timm cannot build the model with these options.
    """
    model = _timm_model(name, options, device)
    model.train()
    num_classes = getattr(model, "num_classes", None)
    is_trained = options.evaluate is None
    if is_trained and dict(options.model_kwargs).get("features_only"):
        raise UsageError(
            f"{name} with features_only=True returns feature maps, and there is no "
            "usual loss for them. Give a Workload with the loss that you train "
            "with."
        )
    if not is_trained and not num_classes:
        # An evaluation has no loss, so it needs no classes.
        num_classes = 1
    if not isinstance(num_classes, int) or num_classes < 1:
        if options.num_classes is not None:
            raise UsageError(
                f"{name} cannot have a classifier. Give a Workload with the loss that "
                "you train with."
            )
        raise UsageError(f"{name} has no classifier by default. Give num_classes.")
    config = import_timm().data.resolve_data_config({}, model=model)
    num_channels, *default_size = config["input_size"]
    num_channels = dict(options.model_kwargs).get("in_chans", num_channels)
    image_size = _image_size_asked(name, options)
    height, width = image_size or default_size
    if image_size not in (None, tuple(default_size)):
        # A model's own size may not fit its patches (siglip's 384 with patches of 14).
        _check_patches(model, name, image_size)

    def batch_of(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.randn(batch_size, num_channels, height, width, device=device)
        return images, torch.randint(num_classes, (batch_size,), device=device)

    return model, batch_of, _classification_loss


def _image_size_asked(name: str, options: StepOptions) -> tuple[int, int] | None:
    """Return the image size that the user gave, by either of the two options."""
    built = dict(options.model_kwargs).get("img_size")
    if built is None:
        return options.image_size
    size = parse_image_size(built)
    if options.image_size not in (None, size):
        raise UsageError(
            f"{name} was asked for with images of {options.image_size[0]}x{options.image_size[1]} "
            f"and with img_size={built!r}: give one of the two."
        )
    return size


def _timm_model(name: str, options: StepOptions, device: torch.device) -> nn.Module:
    if device.type != "meta":
        return _created(name, options)
    try:
        # Filling a meta tensor does nothing, and takes time.
        with device, UnfilledWeights():
            return _created(name, options)
    except UsageError:
        # Some models compute with tensors while they are built, and a meta tensor has no values.
        # `_created` takes every error inside the model for a wrong argument. So the model is built
        # with values, and an argument that is really wrong is refused again.
        return _created(name, options)


def _created(name: str, options: StepOptions) -> nn.Module:
    timm = import_timm()
    kwargs = dict(as_built(name, options).model_kwargs)
    if options.num_classes is not None:
        kwargs["num_classes"] = options.num_classes
    if kwargs.pop("pretrained", False):
        raise UsageError(
            f"The weights of {name} are random, which take as many bytes, and memfit downloads "
            "nothing: leave out pretrained=True."
        )
    if kwargs.pop("checkpoint_path", None):
        raise UsageError(
            f"The weights of {name} are random, which take as many bytes: leave out "
            "checkpoint_path."
        )
    if "in_chans" in kwargs:
        kwargs["in_chans"] = parse_count("in_chans", kwargs["in_chans"])
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **kwargs)
    except Exception as error:
        # The model's arguments are the user's, and what models raise for wrong ones differs.
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        asked = f" with {given}" if given else ""
        if "img_size" in kwargs and "'img_size'" in str(error):
            raise UsageError(
                f"{name} is built without an image size, and takes images of any: give image_size "
                "(--image-size) instead of img_size."
            ) from error
        why = str(error).strip().partition("\n")[0]
        said = why if isinstance(error, _SAYS_ENOUGH) and why else f"{type(error).__name__} {why}"
        hint = _nearest_argument(name, why)
        raise UsageError(f"timm cannot build {name}{asked}: {said.strip()}{hint}") from error
    return model


def _nearest_argument(name: str, message: str) -> str:
    """Return a question with the nearest argument of a model's class, if one is near."""
    found = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    if found is None:
        return ""
    home = sys.modules[import_timm().models.model_entrypoint(name).__module__]
    kind = getattr(home, found[1], None)
    known = () if kind is None else inspect.signature(kind).parameters
    near = difflib.get_close_matches(found[2], known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def patches_of(name: str, options: StepOptions) -> tuple[int, ...]:
    """Return the pixels of which the sides of a model's images must be multiples.

    Args:
        name: The model's name.
        options: The step's options.

    Returns:
        Pixels of a patch's height and width. The result is empty if every image size works.
    """
    return _patches(_timm_model(name, options, torch.device("meta")))


def _patches(model: nn.Module) -> tuple[int, ...]:
    embed = getattr(model, "patch_embed", None)
    # timm's own embedding always has this attribute. Other embeddings take any size.
    if getattr(embed, "dynamic_img_pad", True):
        return ()
    return tuple(getattr(embed, "patch_size", None) or ())


def _check_patches(model: nn.Module, name: str, image_size: tuple[int, int]) -> None:
    for side, patch in zip(image_size, _patches(model), strict=False):
        if side % patch:
            below, above = side // patch * patch, (side // patch + 1) * patch
            near = " or ".join(str(size) for size in (below, above) if size)
            raise UsageError(
                f"An image side of {side} is not a multiple of {name}'s patches of {patch} pixels; "
                f"the nearest is {near}."
            )


def uses_fused_attention() -> bool:
    """Whether timm's attention calls `scaled_dot_product_attention`."""
    return bool(import_timm().layers.use_fused_attn())


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Let models that are built in the block call `scaled_dot_product_attention`."""
    layers = import_timm().layers
    before = layers.use_fused_attn()
    layers.set_fused_attn(enable=True)
    try:
        yield
    finally:
        layers.set_fused_attn(enable=bool(before))


def split_images(batch: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the images of a batch, and its classes as the only targets."""
    images, classes = batch
    return images, (classes,)


def smaller_images(model: nn.Module, batch: Any) -> Any | None:
    """Return a batch with images of at most 64 pixels a side, cut out of the batch's own.

    Args:
        model: A model of timm's.
        batch: Images and classes.

    Returns:
        The batch; `None` if the model takes one size only, or if the images are small already.
    """
    images, classes = batch
    height, width = (min(side, _SMALL_SIDE) for side in images.shape[-2:])
    config = getattr(model, "pretrained_cfg", None) or {}
    if config.get("fixed_input_size") or (height, width) == images.shape[-2:]:
        return None
    return images[..., :height, :width].contiguous(), classes


def _classification_loss(outputs: Any, classes: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of class scores of shape (samples, classes).

    If the model has several outputs, their cross-entropies are added.
    """
    if isinstance(outputs, (tuple, list)):
        return torch.stack([_classification_loss(output, classes) for output in outputs]).sum()
    return F.cross_entropy(outputs, classes)
