"""Compiles the library of the rehearsed device, or finds the one in the wheel.

At the first use, the library is compiled with the system's C compiler into the user's cache. The
folder's name is a digest of the sources, so a new version of memfit compiles a new library. No
library is loaded from a folder that another user can write to.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from memfit.errors import UnsupportedError
from memfit.user_cache import cache_folder

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
_COMPILERS = ("cc", "gcc", "clang")


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
    folder = _cache_folder() / f"{sources_digest()}-{platform.machine()}"
    if not folder.is_dir():
        _compile_into(folder)
    _check_private(folder, names=(LIBRARY, NVML_LIBRARY, LINKED_NAME))
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise UnsupportedError(
            "The compiled device of a rehearsal cannot be loaded from "
            f"{str(folder)!r}, because programs in that folder may not run "
            "(noexec). Set XDG_CACHE_HOME to another folder."
        )
    return folder


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


def compiler() -> tuple[str, ...] | None:
    """Return the command of the C compiler: `$CC`, or else the first usual name that exists."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in (named, *([name] for name in _COMPILERS)):
        if command and shutil.which(command[0]):
            return tuple(command)
    return None


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
    run = subprocess.run(  # noqa: S603 - the user's own compiler
        command, capture_output=True, text=True, check=False
    )
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise UnsupportedError(
            f"The C compiler {command[0]!r} could not compile the device that a rehearsal needs: "
            f"{first.strip()}"
        )


def _compile_into(folder: Path) -> None:
    command = compiler()
    if command is None:
        raise UnsupportedError(
            "A rehearsal needs a C compiler (cc, gcc or clang, or $CC), and there "
            "is none. Install one, or install a memfit wheel that has the compiled "
            "device."
        )
    parent = folder.parent
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(parent)
        # Two processes may do this at once. Each one compiles, and the first result is kept.
        under_way = Path(tempfile.mkdtemp(dir=parent, prefix=".compiling-"))
    except OSError as exc:
        raise UnsupportedError(
            "The device that a rehearsal needs cannot be compiled into "
            f"{str(parent)!r} ({exc.strerror}). Set XDG_CACHE_HOME to a folder that "
            "you can write to."
        ) from exc
    try:
        compile_libraries(under_way, command)
        for name in (LIBRARY, NVML_LIBRARY, LINKED_NAME):
            (under_way / name).chmod(0o700)
        try:
            under_way.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(under_way, ignore_errors=True)


def _cache_folder() -> Path:
    """Return the folder of compiled devices in the user's cache."""
    return cache_folder() / "rehearsal"


def _check_private(folder: Path, names: tuple[str, ...] = ()) -> None:
    """Refuse a folder, or files in it, that another user could have written."""
    for path in (folder, *(folder / name for name in names)):
        found = path.lstat()
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
            _refuse(path)
    for path in folder.resolve().parents:
        found = path.stat()
        # In a sticky folder, such as /tmp, other users cannot rename the user's files.
        is_open = found.st_mode & 0o002 or (
            found.st_mode & 0o020 and found.st_gid not in {0, os.getegid()}
        )
        if found.st_uid not in {0, os.geteuid()} or (is_open and not found.st_mode & stat.S_ISVTX):
            _refuse(path)


def _refuse(path: Path) -> None:
    raise UnsupportedError(
        f"The compiled device of a rehearsal is not loaded from {str(path)!r}, "
        "because other users may write there. Forbid that (chmod go-w), or set "
        "XDG_CACHE_HOME to your own folder."
    )
