"""The wheel's build hook: compiles the rehearsed device into it, where there is a C compiler.

Without one the wheel is a pure one, and the device is compiled at its first use.
"""

from __future__ import annotations

import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class DeviceHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the compiled libraries under `memfit/rehearsal/lib`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless the wheel only points to the sources (`pip install -e`)."""
        sys.path.insert(0, self.root)
        from memfit.rehearsal import build

        command = build.compiler()
        if version == "editable" or sys.platform != "linux" or command is None:
            return
        self._compiled = tempfile.TemporaryDirectory()
        folder = Path(self._compiled.name)
        build.compile_libraries(folder, command, flags=("-Wall", "-Wextra", "-Werror"))
        target = build.carried_folder(Path("memfit/rehearsal/lib"))
        for name in (build.LIBRARY, build.NVML_LIBRARY, build.LINKED_NAME):
            build_data["force_include"][str(folder / name)] = str(target / name)
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact: str) -> None:
        """Take the compiled libraries away again."""
        del version, build_data, artifact
        if hasattr(self, "_compiled"):
            self._compiled.cleanup()
