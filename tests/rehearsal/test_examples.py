"""The seven examples, unmodified: what each takes of a card, and that a shortage is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pinned import IS_PINNED

EXAMPLES = Path(__file__).parents[2] / "examples" / "rehearse"
# Two runs at once need two ports; torch 2.8 takes the same one without --standalone.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PYTHON = (sys.executable,)
"""The torch that the peaks are of; another may take a few bytes more or less."""

# The peaks of the process that holds the most, in bytes: requested, allocated, reserved.
PEAKS = {
    "plain_pytorch": (305_771_352, 314_448_896, 358_612_992),
    "lightning_trainer": (798_047_084, 798_651_392, 962_592_768),
    "transformers_trainer": (475_736_396, 479_309_312, 524_288_000),
    "fastai_learner": (820_940_892, 821_995_520, 952_107_008),
    "timm_loader": (1_878_330_836, 1_906_401_280, 2_218_786_816),
    # `tests/backends/test_rehearsed_ranks.py` holds a step's trial against these two.
    "ddp": (447_963_904, 454_145_536, 572_522_496),
    "fsdp2": (1_023_461_596, 1_023_880_704, 1_216_348_160),
}
# On an RTX 4090 and on an H100.
PEAKS_ELSEWHERE = {
    "plain_pytorch": (
        (307_934_539, 316_874_752, 358_612_992),
        (320_779_552, 328_408_576, 381_681_664),
    ),
    "lightning_trainer": (
        (810_853_632, 811_436_544, 991_952_896),
        (818_649_992, 819_232_256, 1_023_410_176),
    ),
    "transformers_trainer": (
        (475_736_396, 479_309_312, 524_288_000),
        (475_736_396, 479_309_312, 557_842_432),
    ),
    "fastai_learner": (
        (833_426_668, 834_481_152, 981_467_136),
        (841_813_620, 842_867_712, 1_012_924_416),
    ),
    "timm_loader": (
        (1_878_330_836, 1_903_190_016, 2_195_718_144),
        (1_896_550_428, 1_925_013_504, 2_145_386_496),
    ),
    "ddp": (
        (457_402_271, 461_187_584, 524_288_000),
        (447_963_776, 454_513_664, 557_842_432),
    ),
    "fsdp2": (
        (1_023_461_596, 1_023_880_704, 1_201_668_096),
        (1_047_283_156, 1_047_701_504, 1_247_805_440),
    ),
}
NEEDS = {
    "lightning_trainer": ("pytorch_lightning",),
    "transformers_trainer": ("transformers", "accelerate"),
    "fastai_learner": ("fastai",),
}
TOO_MANY = {"timm_loader": 512}
"""Samples in a batch that fits no card of 12 GB, where 4096 take long to load."""


EACH_EXAMPLE = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.needs(*NEEDS.get(name, ()))) for name in PEAKS],
)


def start(name: str, *options: str, gpus: tuple[str, ...] = ("rtx3060",)) -> subprocess.Popen[str]:
    runner = TORCHRUN if name in ("ddp", "fsdp2") else PYTHON
    cards = [word for gpu in gpus for word in ("--gpu", gpu)]
    memfit = (sys.executable, "-m", "memfit", "rehearse", *cards, "--json", "--")
    return subprocess.Popen(
        [*memfit, *runner, str(EXAMPLES / f"{name}.py"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def results_of(child: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]], str]:
    out, err = child.communicate(timeout=300)
    assert out, err
    return child.returncode, json.loads(out)["results"], err


def result_of(child: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
    code, (found,), err = results_of(child)
    return code, found, err


def test_every_example_is_tested() -> None:
    """The list below has every example of the folder."""
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PEAKS)


@pytest.mark.rehearses
@EACH_EXAMPLE
def test_an_example_fits_and_one_that_is_too_large_does_not(name: str) -> None:
    """The peak is known to the byte. A batch that is too large ends with exit code 3."""
    fits, does_not = start(name), start(name, "--batch-size", str(TOO_MANY.get(name, 4096)))
    code, found, err = result_of(fits)
    assert (code, found["end"], found["source"]) == (0, "settled", "rehearsed"), err
    assert "Traceback" not in err
    assert not [note for note in found["notes"] if "watch failed" in note]
    ranks = [process["rank"] for process in found["processes"]]
    assert ranks == ([0, 1] if name in ("ddp", "fsdp2") else [None])
    assert same(peak_of(found), PEAKS[name])
    code, found, err = result_of(does_not)
    assert (code, found["end"]) == (3, "out_of_memory"), err
    assert found["message"].startswith("CUDA out of memory. Tried to allocate ")
    assert found["message"].partition(" GPU")[0] in err
    shortages = [shortage for process in found["processes"] for shortage in process["shortages"]]
    assert max(shortage["missing_bytes"] for shortage in shortages) > 0
    assert shortages[0]["line"].partition(":")[0] == str(EXAMPLES / f"{name}.py")


@pytest.mark.rehearses
@EACH_EXAMPLE
def test_an_example_has_its_peak_on_each_card(name: str) -> None:
    """One command rehearses it on both cards, one after the other."""
    code, found, err = results_of(start(name, gpus=("rtx4090", "h100")))
    assert (code, [result["end"] for result in found]) == (0, ["settled", "settled"]), err
    assert all(map(same, map(peak_of, found), PEAKS_ELSEWHERE[name]))


@pytest.mark.rehearses
def test_a_lone_rank_takes_what_a_rank_of_torchrun_takes() -> None:
    """Without torchrun and without the other rank, the peak is the same to the byte."""
    memfit = (sys.executable, "-m", "memfit", "rehearse", "--gpu", "rtx3060", "--json")
    found = subprocess.run(
        [*memfit, "--world-size", "2", "--", sys.executable, str(EXAMPLES / "ddp.py")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    (result,) = json.loads(found.stdout)["results"]
    assert same(peak_of(result), PEAKS["ddp"])
    assert [process["rank"] for process in result["processes"]] == [0]


def peak_of(found: dict[str, Any]) -> tuple[int, ...]:
    peak = found["peak"]
    return peak["requested_bytes"], peak["allocated_bytes"], peak["reserved_bytes"]


def same(seen: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return seen == expected if IS_PINNED else nearly(seen, expected)


def nearly(seen: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    pairs = zip(seen, expected, strict=True)
    return all(abs(value - other) < 0.2 * other for value, other in pairs)
