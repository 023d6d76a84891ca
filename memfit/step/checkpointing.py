"""Recomputes chosen blocks of a model in backward: which blocks it has, and how they are wrapped.

A block is a module that a model has several of, such as the layers of a transformer or the
residual blocks of a stage. Its `forward` is called through `torch.utils.checkpoint`, so its
activations are not kept, and are computed again when backward reaches it.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from memfit.errors import UsageError

__all__ = ["blocks_of", "checkpoint", "matched_blocks"]

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NUM_NEAREST = 3
# A member of a list is a block if it has so many layers; alone, a layer is none.
_LAYERS_OF_A_MEMBER = 2
# Without a list, blocks are told by their class: so many, each with so many layers.
_NUM_ALIKE = 3
_LAYERS_OF_A_BLOCK = 4


def checkpoint(model: nn.Module, blocks: str | Iterable[str]) -> None:
    """Recompute some blocks of a model in backward instead of keeping their activations.

    The names of parameters and the state dictionary stay as they are. Gradients are the same. A
    batch norm inside such a block counts its means twice, as with every checkpointing of PyTorch's.

    Args:
        model: The model; the `forward` of the chosen modules is replaced in place.
        blocks: Names of modules as in `model.named_modules()`, or patterns of them such as
            `"layer1.*"`. `plan.options.checkpoint` of a plan has them.

    Raises:
        UsageError: A name matches no module, or a module is chosen that is recomputed already.
    """
    patterns = (blocks,) if isinstance(blocks, str) else tuple(blocks)
    for name in matched_blocks(model, patterns, name=type(model).__name__):
        block = model.get_submodule(name)
        if _is_recomputed(block):
            raise UsageError(f"{name!r} of {type(model).__name__} is recomputed already.")
        block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)


def matched_blocks(model: nn.Module, patterns: Sequence[str], *, name: str) -> tuple[str, ...]:
    """Return the names of the modules that patterns match, in the model's order.

    A module inside another one that is matched is left out, because it is recomputed with it.

    Args:
        model: The model.
        patterns: Names, or patterns as in a shell. A pattern must match the whole name.
        name: The model's name in errors.

    Raises:
        UsageError: A pattern matches no module.
    """
    known = [path for path, _ in model.named_modules() if path]
    wanted: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(known, pattern)
        if not found:
            raise UsageError(f"{name} has no module {pattern!r}{_nearest(pattern, model, known)}")
        wanted.update(found)
    return tuple(path for path in known if path in wanted and not (_parents_of(path) & wanted))


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's blocks, none inside another, in the model's order.

    They are the members of a model's lists. Of a stage, which is mostly a list itself, they are its
    blocks and not the stage.
    """
    return tuple(_blocks_in("", model))


def _blocks_in(path: str, module: nn.Module) -> list[str]:
    found: list[str] = []
    alike = _alike(module)
    for name, child in module.named_children():
        inside = f"{path}.{name}" if path else name
        is_member = isinstance(module, _LISTS) and _num_layers(child) >= _LAYERS_OF_A_MEMBER
        if (is_member or child in alike) and not _is_stage(child):
            found.append(inside)
        else:
            found += _blocks_in(inside, child)
    return found


def _is_stage(module: nn.Module) -> bool:
    """Whether a module is mostly a list of blocks."""
    if isinstance(module, _LISTS):
        return not isinstance(module, nn.Sequential) or _has_members(module)
    lists = (child for child in module.children() if isinstance(child, _LISTS))
    most = _num_weights(module) // 2
    return bool(_alike(module)) or any(
        _has_members(child) and _num_weights(child) > most for child in lists
    )


def _alike(module: nn.Module) -> list[nn.Module]:
    """Return the children of a class of which there are several, such as the blocks of a RegNet."""
    large = [
        child
        for child in module.children()
        if not isinstance(child, _LISTS) and _num_layers(child) >= _LAYERS_OF_A_BLOCK
    ]
    kinds = Counter(map(type, large))
    return [child for child in large if kinds[type(child)] >= _NUM_ALIKE]


def _has_members(module: nn.Module) -> bool:
    return any(_num_layers(child) >= _LAYERS_OF_A_MEMBER for child in module.children())


def _num_layers(module: nn.Module) -> int:
    """Return how many modules inside have parameters of their own."""
    return sum(any(True for _ in part.parameters(recurse=False)) for part in module.modules())


def _num_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _parents_of(path: str) -> set[str]:
    parts = path.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def _is_recomputed(module: nn.Module) -> bool:
    forward: Any = module.forward
    return isinstance(forward, functools.partial) and forward.func is recomputed


def _nearest(pattern: str, model: nn.Module, known: Sequence[str]) -> str:
    """Return the end of a sentence that names modules like the pattern."""
    near = difflib.get_close_matches(pattern, known, n=_NUM_NEAREST, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    blocks = blocks_of(model)
    return f"; its blocks are named like {blocks[0]!r}." if blocks else "; it has no blocks."
