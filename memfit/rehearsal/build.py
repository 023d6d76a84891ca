"""Compiles the library of the rehearsed device, or finds the one in the wheel.

At the first use, the library is compiled with the system's C compiler into the user's cache
(`memfit.user_cache`).
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from memfit.errors import UnsupportedError
from memfit.user_cache import compile_into_cache, compiler, run_compiler

__all__ = [
    "LIBRARY",
    "LINKED_NAME",
    "NVML_LIBRARY",
    "carried_folder",
    "compile_libraries",
    "compiler",
    "library_folder",
    "sources_digest",
]

LIBRARY = "libcuda.so.1"
"""The driver's own name, so that a program that loads the driver gets this library."""

NVML_LIBRARY = "libnvidia-ml.so.1"
"""An empty library that needs the other one: NVML's functions are looked up through it."""

LINKED_NAME = "libcuda.so"
"""What the linker looks for: some Triton links its launcher with `-lcuda`. A linker script."""

_SOURCES = Path(__file__).with_name("device")
_CARRIED = Path(__file__).with_name("lib")
_COMPILING = ("-std=gnu11", "-O2", "-fPIC", "-fvisibility=hidden", "-pthread")
_LINKING = ("-shared", "-fPIC", "-pthread")
_LOADS = "the compiled device of a rehearsal"


@functools.cache
def library_folder() -> Path:
    """Return the folder of the compiled libraries. If they do not exist yet, compile them.

    Raises:
        UnsupportedError: There is neither a compiler nor a compiled library, or the compiler
            fails, or the cache is a folder that others can write.
    """
    carried = carried_folder(_CARRIED)
    if (carried / NVML_LIBRARY).is_file():
        return carried
    return compile_into_cache(
        "rehearsal",
        sources_digest(),
        _compile_into,
        names=(LIBRARY, NVML_LIBRARY, LINKED_NAME),
        loads=_LOADS,
    )


def carried_folder(root: Path) -> Path:
    """Return the folder in a wheel with the libraries of these sources for this processor."""
    return root / platform.machine() / sources_digest()


def sources_digest() -> str:
    """Return a digest of the sources and of the way in which they are compiled."""
    digest = hashlib.sha256(" ".join((*_COMPILING, *_LINKING, LINKED_NAME)).encode())
    for path in sorted(_SOURCES.rglob("*.[ch]")):
        digest.update(f"\0{path.relative_to(_SOURCES)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def compile_libraries(
    folder: Path, command: tuple[str, ...], *, flags: tuple[str, ...] = ()
) -> None:
    """Compile the libraries.

    Args:
        folder: The folder to write them to.
        command: The compiler, as `compiler` returns it.
        flags: More of its options, as in `("-Werror",)`.

    Raises:
        UnsupportedError: The compiler fails.
    """
    sources = sorted(_SOURCES.rglob("*.c"))
    with tempfile.TemporaryDirectory() as objects, ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = [str(Path(objects, f"{index}.o")) for index in range(len(sources))]
        commands = [
            [*command, *_COMPILING, *flags, "-c", "-o", target, str(source)]
            for source, target in zip(sources, compiled, strict=True)
        ]
        for _ in pool.map(_run, commands):
            pass
        _run([*command, *_LINKING, *flags, *_named(folder / LIBRARY), *compiled, "-ldl"])
    with tempfile.NamedTemporaryFile(suffix=".c") as empty:
        needed = ("-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN", str(folder / LIBRARY))
        _run([*command, *_LINKING, *flags, *_named(folder / NVML_LIBRARY), empty.name, *needed])
    (folder / LINKED_NAME).write_text(f"INPUT({LIBRARY})\n", encoding="ascii")


def _named(target: Path) -> tuple[str, ...]:
    return (f"-Wl,-soname,{target.name}", "-o", str(target))


def _run(command: list[str]) -> None:
    run_compiler(command, makes="the device that a rehearsal needs")


def _compile_into(folder: Path) -> None:
    command = compiler()
    if command is None:
        raise UnsupportedError(
            "A rehearsal needs a C compiler (cc, gcc or clang, or $CC), and there "
            "is none. Install one, or install a memfit wheel that has the compiled "
            "device."
        )
    compile_libraries(folder, command)
