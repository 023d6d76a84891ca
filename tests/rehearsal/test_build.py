"""The rehearsed device's library: compiled cleanly, kept safely, watched by sanitizers."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from memfit.errors import UnsupportedError
from memfit.rehearsal import build

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or build.compiler() is None, reason="needs Linux and a C compiler"
)

_WARNINGS = ("-Wall", "-Wextra", "-Werror")
_EMULATED_BYTES = 128 << 30
_SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# Of these there is only one for all libraries together; or they are of the runtime's own build.
_NOT_OURS = re.compile(r"^(_init|_fini|__cudart.*|libcudart\.so\.\d+)$")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the libraries; a warning counts as an error."""
    folder = tmp_path_factory.mktemp("compiled")
    command = build.compiler()
    assert command is not None
    build.compile_libraries(folder, command, flags=_WARNINGS)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the test an empty cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library_folder.cache_clear()
    yield tmp_path / "memfit" / "rehearsal"
    build.library_folder.cache_clear()


def _quick_compiler(folder: Path) -> str:
    """Return a compiler that does not optimize, so that the test is quick."""
    script = folder / "quickcc"
    script.write_text('#!/bin/sh\nexec cc "$@" -O0\n')
    script.chmod(0o700)
    return str(script)


def test_every_public_name_of_the_runtime_is_there(compiled: Path) -> None:
    """Every function of the libcudart that torch brought is in the rehearsed one too."""
    real = [
        Path(str(file.locate()))
        for name in ("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime-cu13")
        for file in _files(name)
        if re.fullmatch(r"libcudart\.so\.\d+", file.name)
    ]
    if not real or not shutil.which("nm"):
        pytest.skip("needs the CUDA runtime of a wheel of torch, and nm")

    ours = _names(compiled / build.LIBRARY)
    theirs = {name for name in _names(real[0]) if not _NOT_OURS.match(name)}

    assert len(theirs) > 300
    assert theirs - ours == set()


def _files(distribution: str) -> list[importlib.metadata.PackagePath]:
    try:
        return importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _names(library: Path) -> set[str]:
    text = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {line.split()[-1].partition("@")[0] for line in text.splitlines()}


def test_only_public_names_are_exported(compiled: Path) -> None:
    """The library defines functions of CUDA and memfit, two of torch, and two of ending.c."""
    prefixes = (
        "cu", "__cu", "_cu", "nccl", "pnccl", "nvml", "nvrtc", "nvJitLink", "__nvJitLink", "nvtx",
        "memfit_rehearsal_", "_ZN3c1027reportMemoryUsage", "_ZN4c10d5nccl216ProcessGroupNCCL5split",
    )  # fmt: skip

    names = _names(compiled / build.LIBRARY)
    assert {name for name in names if not name.startswith(prefixes)} == {"exit", "pthread_exit"}


def test_other_compiler_has_no_warning_either(tmp_path: Path) -> None:
    """Clang compiles the same sources without a warning."""
    if not shutil.which("clang"):
        pytest.skip("needs clang")

    build.compile_libraries(tmp_path, ("clang",), flags=(*_WARNINGS, "-O0"))

    assert ctypes.CDLL(str(tmp_path / build.LIBRARY)).memfit_rehearsal_version() == 1


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """A program uses memory, copies, graphs, threads and forks, and two sanitizers watch it."""
    command = build.compiler()
    assert command is not None
    program = tmp_path / "exercise"
    source = Path(__file__).with_name("exercise.c")
    try:
        build.compile_libraries(tmp_path, command, flags=(*_SANITIZERS, "-O0", "-g"))
        subprocess.run(
            [*command, "-g", *_SANITIZERS, "-o", str(program), str(source), "-ldl", "-lpthread"],
            check=True,
            capture_output=True,
        )
    except (UnsupportedError, subprocess.CalledProcessError):
        pytest.skip("the compiler has no sanitizers")

    run = _exercise([str(program), str(tmp_path / build.LIBRARY)])
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_other_architecture_does_the_same(tmp_path: Path) -> None:
    """The library for aarch64 passes the same program, in an emulator."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-gcc and qemu (`make test` gets them from Debian)")

    build.compile_libraries(tmp_path, (compiler,), flags=(*_WARNINGS, "-O0"))
    program, source = tmp_path / "exercise", Path(__file__).with_name("exercise.c")
    subprocess.run([compiler, "-o", program, source, "-ldl", "-lpthread"], check=True)

    # Without a bound on its addresses the emulator uses up the host's memory.
    emulated = [emulator, "-R", hex(_EMULATED_BYTES), "-L", "/usr/aarch64-linux-gnu"]
    run = _exercise([*emulated, str(program), str(tmp_path / build.LIBRARY)])
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def _exercise(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, "MEMFIT_REHEARSED_CARD": "total_bytes=4294967296;capability=8.6"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_layouts_of_the_properties_are_cudas(compiled: Path) -> None:
    """`cudaDeviceProp` has the length that CUDA 12 and CUDA 13 give it."""
    size = ctypes.CDLL(str(compiled / build.LIBRARY)).memfit_rehearsal_properties_bytes

    # sizeof(cudaDeviceProp) under the headers of 12.8 and of 13.2.
    assert (size(12), size(13)) == (1032, 1008)


def test_first_use_compiles_into_a_folder_of_the_users_own(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is named after the sources, has mode 0700, and holds only finished files."""
    monkeypatch.setenv("CC", _quick_compiler(tmp_path))

    folder = build.library_folder()

    assert folder.parent == cache
    assert folder.name.startswith(build.sources_digest())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in cache.iterdir()] == [folder.name]
    names = {build.LIBRARY, build.NVML_LIBRARY, build.LINKED_NAME}
    assert {path.name for path in folder.iterdir()} == names

    # It is not compiled again, and not loaded when somebody else could have written it.
    monkeypatch.setenv("CC", "/bin/false")
    build.library_folder.cache_clear()
    assert build.library_folder() == folder
    for path in (folder, folder / build.LIBRARY, tmp_path):
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        build.library_folder.cache_clear()
        with pytest.raises(UnsupportedError, match=re.escape(f"not loaded from '{path}'")):
            build.library_folder()
        path.chmod(mode)


@pytest.mark.usefixtures("cache")
def test_neither_a_compiler_nor_a_wheels_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one sentence that says what to install."""
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", "")

    with pytest.raises(UnsupportedError, match=r"needs a C compiler \(cc, gcc or clang, or \$CC\)"):
        build.library_folder()


@pytest.mark.usefixtures("cache")
def test_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the folder, the reason, and the variable that moves the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")

    with pytest.raises(
        UnsupportedError, match=r"into '/dev/null/memfit/rehearsal' \(Not a directory\). Set XDG"
    ):
        build.library_folder()


@pytest.mark.usefixtures("cache")
def test_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the first error of the compiler."""
    broken = tmp_path / "brokencc"
    broken.write_text("#!/bin/sh\necho 'x.c:1: error: out of ink' >&2\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CC", str(broken))

    with pytest.raises(UnsupportedError, match=r"could not compile the device .*out of ink"):
        build.library_folder()


@pytest.mark.usefixtures("cache")
def test_wheels_library_needs_no_compiler(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a wheel has libraries of the same sources, they are used as they are."""
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(build, "_CARRIED", tmp_path / "lib")
    carried = build.carried_folder(tmp_path / "lib")
    shutil.copytree(compiled, carried)

    assert build.library_folder() == carried
