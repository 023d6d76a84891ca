"""Putting a rehearsed card in front of torch, and the sentences where that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import memfit
from memfit.cards import find_gpu
from memfit.errors import UnsupportedError, UsageError
from memfit.rehearsal import activate, build


@pytest.mark.rehearses
def test_a_script_rehearses_in_its_own_process() -> None:
    """A script calls `memfit.rehearse` before `import torch`. A second card is refused."""
    script = '''
import memfit
memfit.rehearse("RTX 4090", memory="16GiB", num_gpus=2)
memfit.rehearse("RTX 4090", memory="16GiB", num_gpus=2)
import torch, subprocess, sys
print(torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1], torch.cuda.device_count())
try:
    memfit.rehearse("RTX 3060")
except memfit.UsageError as exc:
    print(exc)
child = """
import ctypes
name = ctypes.create_string_buffer(99)
ctypes.CDLL("libcuda.so.1").cuDeviceGetName(name, 99, 1)
print(name.value.decode())
"""
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout.strip())
'''
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )

    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [
        f"NVIDIA GeForce RTX 4090 {16 * 2**30} 2",
        (
            "This process already rehearses a card, so it cannot rehearse NVIDIA GeForce RTX "
            "3060. Start a new process for each card."
        ),
        "NVIDIA GeForce RTX 4090",
    ]


@pytest.mark.rehearses
def test_without_a_card_this_process_sees_none_and_its_forks_see_theirs() -> None:
    """The device is in front of torch. Each fork rehearses the card that its environment names."""
    script = """
import os, sys
from memfit.cards import find_gpu
from memfit.rehearsal.activate import load_without_card, rehearsed_environment
cards = [find_gpu(name) for name in ("rtx3060", "rtx4090")]
assert load_without_card(cards[0])
import torch
assert not load_without_card(cards[0])
for card in cards:
    if not os.fork():
        os.environ.update(rehearsed_environment(card))
        print(torch.zeros(1, device="cuda").device, torch.cuda.get_device_name(), flush=True)
        os._exit(0)
    os.wait()
print(torch.cuda.is_available(), torch.cuda.device_count())
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines() == [
        "cuda:0 NVIDIA GeForce RTX 3060",
        "cuda:0 NVIDIA GeForce RTX 4090",
        "False 0",
    ]


@pytest.mark.rehearses
def test_after_torch_it_is_too_late() -> None:
    """After `import torch`, the call raises an error of one sentence and changes nothing."""
    before = dict(os.environ)

    with pytest.raises(UsageError, match=r"torch is already imported.* before anything imports"):
        memfit.rehearse("RTX 4090")

    assert dict(os.environ) == before


@pytest.mark.rehearses
def test_environment_keeps_what_is_preloaded_and_hides_no_card() -> None:
    """Both libraries come before those that the user preloads, and every card is visible."""
    card = find_gpu("RTX 3090")

    added = activate.rehearsed_environment(
        card, num_gpus=2, others_bytes=5, environment={"LD_PRELOAD": "libjemalloc.so other.so"}
    )
    again = activate.rehearsed_environment(card, num_gpus=2, environment=added)

    first, second, *rest = added["LD_PRELOAD"].split(":")
    assert (Path(first).name, Path(second).name) == (build.LIBRARY, build.NVML_LIBRARY)
    assert rest == ["libjemalloc.so", "other.so"]
    assert again["LD_PRELOAD"] == added["LD_PRELOAD"]
    assert added["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert added["TRITON_LIBCUDA_PATH"] == str(Path(first).parent)
    settings = dict(pair.split("=") for pair in added[activate.CARD_VARIABLE].split(";"))
    assert settings["name"] == card.name
    assert int(settings["total_bytes"]) == card.total_bytes
    assert int(settings["context_bytes"]) == card.context_bytes
    assert settings["others_bytes"] == "5"
    assert settings["capability"] == "8.6"


@pytest.mark.rehearses
@pytest.mark.parametrize("num_gpus", [0, 17])
def test_number_of_gpus(num_gpus: int) -> None:
    """There can be from one to sixteen cards."""
    with pytest.raises(UsageError, match=f"1 to 16 GPUs, not {num_gpus}"):
        activate.rehearsed_environment(find_gpu("RTX 3090"), num_gpus=num_gpus)


@pytest.mark.rehearses
@pytest.mark.parametrize("name", ["my cache", "a:b"])
def test_folder_that_cannot_be_preloaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The linker splits names at spaces and colons, so such a folder is refused."""
    monkeypatch.setattr(activate, "library_folder", lambda: Path("/home/me") / name)

    with pytest.raises(UnsupportedError, match=f"'/home/me/{name}', because a space or a colon"):
        activate.rehearsed_environment(find_gpu("RTX 3090"))


def test_amds_cards_are_simulated() -> None:
    """An AMD card cannot be rehearsed, and the message offers the simulation."""
    with pytest.raises(UsageError, match=r"Only NVIDIA's cards .* AMD's\. The simulation works"):
        activate.check_supported(find_gpu("MI300X"))


@pytest.mark.parametrize(("system", "name"), [("darwin", "Darwin"), ("win32", "Windows")])
def test_other_systems(system: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS and Windows the message offers the simulation."""
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("platform.system", lambda: name)

    with pytest.raises(
        UnsupportedError, match=f"needs Linux; this is {name}. The simulation works"
    ):
        activate.check_supported(find_gpu("RTX 3090"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
@pytest.mark.parametrize(
    ("libraries", "sentence"),
    [
        (("libtorch_cpu.so",), r"torch is not built for CUDA|has no CUDA"),
        (("libtorch_cpu.so", "libtorch_hip.so"), "is built for ROCm"),
    ],
)
def test_other_builds_of_torch(
    libraries: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build of torch for CPUs or for ROCm is recognised by its files. It is not imported."""
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").touch()
    for name in libraries:
        (tmp_path / "torch" / "lib" / name).touch()
    spec = importlib_spec(tmp_path / "torch" / "__init__.py")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)

    with pytest.raises(UnsupportedError, match=sentence):
        activate.check_supported(find_gpu("RTX 3090"))


def importlib_spec(path: Path) -> object:
    """Return the spec of a package, as `find_spec` does."""
    from importlib.machinery import ModuleSpec

    return ModuleSpec("torch", None, origin=str(path))


@pytest.mark.rehearses
@pytest.mark.parametrize("cuda", ["12.8", "13.2"])
def test_a_card_older_than_torchs_cuda_is_refused_and_simulated(
    cuda: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA 13 begins with Turing. `auto` simulates such a card."""
    version = f'__version__ = "2.15.0"\ncuda: Optional[str] = "{cuda}"\n'
    monkeypatch.setattr(activate, "_text_of", lambda _path: version)
    card = find_gpu("p100")
    if cuda == "12.8":
        activate.check_supported(card)
        return
    with pytest.raises(UnsupportedError, match=r"built for CUDA 13, which begins at 7\.5"):
        activate.check_supported(card)
    activate.check_supported(find_gpu("t4"))
    result = memfit.probe("test_vit", gpu="p100", max_batch_size=2, engine="auto")
    assert isinstance(result, memfit.ProbeResult)
    assert result.source is memfit.Source.SIMULATED


@pytest.mark.rehearses
def test_a_card_that_cudnn_cannot_describe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN 9.10, of torch 2.8 to 2.10, crashes when it is asked for a B200."""
    monkeypatch.setattr(activate, "_cudnn_release", lambda _cuda: (9, 10))
    activate.check_supported(find_gpu("h100"))
    with pytest.raises(
        UnsupportedError, match=r"cuDNN 9\.10 cannot choose kernels for NVIDIA B200"
    ):
        activate.check_supported(find_gpu("b200"))
