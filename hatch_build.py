"""The wheel's build hook: compiles memfit's C sources into it, where there is a C compiler.

These are the rehearsed device and the allocator that replays steps. Without a compiler the wheel is
a pure one, and they are compiled at their first use.
"""

from __future__ import annotations

import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class DeviceHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the compiled libraries, each in the folder `lib` beside its sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless the wheel only points to the sources (`pip install -e`)."""
        sys.path.insert(0, self.root)
        from memfit.rehearsal import build
        from memfit.simulation.allocator import compiled

        command = build.compiler()
        if version == "editable" or sys.platform != "linux" or command is None:
            return
        self._compiled = tempfile.TemporaryDirectory()
        folder = Path(self._compiled.name)
        flags = ("-Wall", "-Wextra", "-Werror")
        build.compile_libraries(folder, command, flags=flags)
        compiled.compile_library(folder, command, flags=flags)
        target = build.carried_folder(Path("memfit/rehearsal/lib"))
        for name in (build.LIBRARY, build.NVML_LIBRARY, build.LINKED_NAME):
            build_data["force_include"][str(folder / name)] = str(target / name)
        replay = compiled.carried_folder(Path("memfit/simulation/allocator/compiled/lib"))
        build_data["force_include"][str(folder / compiled.LIBRARY)] = str(replay / compiled.LIBRARY)
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact: str) -> None:
        """Take the compiled libraries away again."""
        del version, build_data, artifact
        if hasattr(self, "_compiled"):
            self._compiled.cleanup()
