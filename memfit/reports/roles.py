"""Names and colours of memory roles in reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from memfit.records import Role

__all__ = ["STYLES", "ModuleNode", "RoleStyle", "module_tree", "short_operation"]


@dataclasses.dataclass(frozen=True, slots=True)
class RoleStyle:
    """How a role looks.

    Args:
        label: Its name in a legend.
        letter: Its letter where colours are not available; each role has another letter.
        colour: As `#rrggbb`; easy to tell apart on a light and on a dark background.
    """

    label: str
    letter: str
    colour: str


STYLES = {
    Role.PARAMETERS: RoleStyle("parameters", "P", "#3b6fb6"),
    Role.BUFFERS: RoleStyle("buffers", "B", "#8fb8de"),
    Role.GRADIENTS: RoleStyle("gradients", "G", "#e07b2a"),
    Role.OPTIMIZER_STATE: RoleStyle("optimizer state", "O", "#c9a227"),
    Role.ACTIVATIONS: RoleStyle("activations saved for backward", "A", "#3d9a5f"),
    Role.AUTOCAST_COPIES: RoleStyle("autocast copies", "C", "#2aa6a0"),
    Role.INPUTS: RoleStyle("inputs", "I", "#7cc36b"),
    Role.TEMPORARIES: RoleStyle("temporaries", "T", "#d2504b"),
    Role.WORKSPACES: RoleStyle("workspaces of libraries", "W", "#b66cb5"),
    Role.SLACK: RoleStyle("allocator rounding", "S", "#a07a5f"),
    Role.FRAGMENTATION: RoleStyle("cached by the allocator, free", "F", "#a9a9a9"),
    Role.CONTEXT: RoleStyle("CUDA context", "X", "#6b6f76"),
}


@dataclasses.dataclass(slots=True)
class ModuleNode:
    """A module with the modules inside it.

    Args:
        name: Its own name.
        path: Its path from the model; empty for the whole model.
        num_bytes: The bytes of this module and of the modules inside it.
        children: The modules directly inside it, by name.
    """

    name: str
    path: str
    num_bytes: int = 0
    children: dict[str, ModuleNode] = dataclasses.field(default_factory=dict)

    @property
    def largest(self) -> list[ModuleNode]:
        """The modules inside it, the largest first."""
        return sorted(self.children.values(), key=lambda child: -child.num_bytes)


def module_tree(shares: Iterable[tuple[str, int]]) -> ModuleNode:
    """Add up the bytes of modules along their paths.

    Args:
        shares: Paths such as `layer1.0.conv2`, and bytes; a path in parentheses stays whole.

    Returns:
        The node of the whole model.
    """
    root = ModuleNode("all", "")
    for path, num_bytes in shares:
        parts = [path] if path.startswith("(") else path.split(".")
        root.num_bytes += num_bytes
        node = root
        for depth, part in enumerate(parts, start=1):
            node = node.children.setdefault(part, ModuleNode(part, ".".join(parts[:depth])))
            node.num_bytes += num_bytes
    return root


def short_operation(name: str) -> str:
    """Return an operation's name without its namespace and its usual overload."""
    return name.removeprefix("aten.").removeprefix("aten::").removesuffix(".default")
