"""Where memfit keeps files for one user between runs, its compiled libraries among them.

C sources are compiled with the system's compiler. The folder's name is a digest of the sources, so
a new version of memfit compiles new libraries. No library is loaded from a folder that another user
can write to.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from memfit.errors import UnsupportedError

__all__ = ["cache_folder", "check_private", "compile_into_cache", "compiler", "run_compiler"]

_COMPILERS = ("cc", "gcc", "clang")


def cache_folder() -> Path:
    """Return memfit's folder in the user's cache. It may not exist yet.

    Source: https://specifications.freedesktop.org/basedir-spec/latest/
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"  # noqa: PTH117
    return root / "memfit"


def compiler() -> tuple[str, ...] | None:
    """Return the command of the C compiler: `$CC`, or else the first usual name that exists."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in (named, *([name] for name in _COMPILERS)):
        if command and shutil.which(command[0]):
            return tuple(command)
    return None


def run_compiler(command: Sequence[str], *, makes: str) -> None:
    """Run a command of the compiler.

    Args:
        command: The compiler and its arguments.
        makes: What is compiled, for the error.

    Raises:
        UnsupportedError: The compiler fails.
    """
    run = subprocess.run(  # noqa: S603 - the user's own compiler
        command, capture_output=True, text=True, check=False
    )
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise UnsupportedError(
            f"The C compiler {command[0]!r} could not compile {makes}: {first.strip()}"
        )


def compile_into_cache(
    kind: str,
    digest: str,
    compile_into: Callable[[Path], None],
    *,
    names: tuple[str, ...],
    loads: str,
) -> Path:
    """Return a folder of the user's cache with compiled libraries, compiled now if need be.

    Args:
        kind: The name of the folder for all versions.
        digest: The name of this version.
        compile_into: Compiles the libraries into a folder.
        names: The files that it writes.
        loads: What is loaded from the folder, for errors.

    Raises:
        UnsupportedError: The cache cannot be written, others can write to it, or the compiler
            fails.
    """
    folder = cache_folder() / kind / f"{digest}-{platform.machine()}"
    if not folder.is_dir():
        _compile(folder, compile_into, names, loads)
    check_private(folder, names=names, loads=loads)
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise UnsupportedError(
            f"{loads[0].upper()}{loads[1:]} cannot be loaded from "
            f"{str(folder)!r}, because programs in that folder may not run "
            "(noexec). Set XDG_CACHE_HOME to another folder."
        )
    return folder


def _compile(
    folder: Path, compile_into: Callable[[Path], None], names: tuple[str, ...], loads: str
) -> None:
    parent = folder.parent
    try:
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(parent, loads=loads)
        # Two processes may do this at once. Each one compiles, and the first result is kept.
        under_way = Path(tempfile.mkdtemp(dir=parent, prefix=".compiling-"))
    except OSError as exc:
        raise UnsupportedError(
            f"{loads[0].upper()}{loads[1:]} cannot be compiled into "
            f"{str(parent)!r} ({exc.strerror}). Set XDG_CACHE_HOME to a folder that "
            "you can write to."
        ) from exc
    try:
        compile_into(under_way)
        for name in names:
            (under_way / name).chmod(0o700)
        try:
            under_way.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(under_way, ignore_errors=True)


def check_private(folder: Path, *, loads: str, names: tuple[str, ...] = ()) -> None:
    """Refuse a folder, or files in it, that another user could have written.

    Args:
        folder: The folder.
        loads: What is loaded from it, for the error.
        names: The files.

    Raises:
        UnsupportedError: Another user can write to it.
    """
    for path in (folder, *(folder / name for name in names)):
        found = path.lstat()
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
            _refuse(path, loads)
    for path in folder.resolve().parents:
        found = path.stat()
        # In a sticky folder, such as /tmp, other users cannot rename the user's files.
        is_open = found.st_mode & 0o002 or (
            found.st_mode & 0o020 and found.st_gid not in {0, os.getegid()}
        )
        if found.st_uid not in {0, os.geteuid()} or (is_open and not found.st_mode & stat.S_ISVTX):
            _refuse(path, loads)


def _refuse(path: Path, loads: str) -> None:
    raise UnsupportedError(
        f"{loads[0].upper()}{loads[1:]} is not loaded from {str(path)!r}, "
        "because other users may write there. Forbid that (chmod go-w), or set "
        "XDG_CACHE_HOME to your own folder."
    )
