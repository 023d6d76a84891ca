"""The pytest plugin, in test runs of its own."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from memfit.errors import UsageError
from memfit.profiling.baselines import Baselines

pytest_plugins = ("pytester",)

# An installed memfit is found by its entry point, and a plugin cannot have two names.
IS_INSTALLED = any(
    point.value == "memfit.cli.pytest_plugin" for point in entry_points(group="pytest11")
)
PLUGIN = (
    *(() if IS_INSTALLED else ("-p", "memfit.cli.pytest_plugin")),
    "-p",
    "no:cacheprovider",
)
SIMULATED = """
import pytest, torch, memfit

HIDDEN = {hidden}

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Linear(64, HIDDEN)
        self.decoder = torch.nn.Linear(HIDDEN, 8)

    def forward(self, rows):
        return self.decoder(torch.relu(self.encoder(rows)))

def batch(size):
    return torch.randn(size, 64), torch.randint(8, (size,))

@pytest.mark.parametrize("number", range({times}))
@pytest.mark.peak_memory({limit}gpu="t4")
def test_step(peak_memory, number):
    workload = memfit.Workload(
        model=Net(), batch=batch, loss=torch.nn.functional.cross_entropy, optimizer="adamw"
    )
    found = peak_memory(workload, 4096, precision="fp32")
    print("PEAK", found.peak.total_bytes)
"""
REHEARSED = """
import pytest, torch

HIDDEN = {hidden}

@pytest.mark.peak_memory(gpu="t4")
def test_step():
    model = torch.nn.Sequential(torch.nn.Linear(64, HIDDEN), torch.nn.Linear(HIDDEN, 8)).to("cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        model(torch.randn(4096, 64, device="cuda")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
"""


def written(pytester: pytest.Pytester, text: str, **values: object) -> None:
    filled = {"hidden": 256, "times": 1, "limit": "", **values}
    pytester.makepyfile(test_it=text.format(**filled))


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    # In this process, a second run would import torch again, which ends the process.
    return pytester.runpytest_subprocess(*PLUGIN, *arguments)


def test_ten_runs_are_alike_and_a_doubled_layer_fails(pytester: pytest.Pytester) -> None:
    """The failure says what grew, by module and role; the file of peaks is not changed."""
    written(pytester, SIMULATED, times=10)
    result = run(pytester, "-s", "--memfit-update")
    result.assert_outcomes(passed=10)
    peaks = [line for line in result.outlines if "PEAK" in line]
    assert len(peaks) == 10
    assert len({line.split("PEAK")[1] for line in peaks}) == 1
    kept = (pytester.path / "memfit-baseline.json").read_text()
    written(pytester, SIMULATED, hidden=512)
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines([r"The peak of .*test_step.*; kept: .*1% is allowed"])
    result.stdout.re_match_lines([r"  \+.* encoder, parameters: .* -> "])
    assert (pytester.path / "memfit-baseline.json").read_text() == kept


def test_limits_and_mistakes(pytester: pytest.Pytester) -> None:
    """Each fails its test with one sentence, and no traceback."""
    markers = {
        '"2GiB", gpu="t4"': "",
        '"2MiB", gpu="t4"': "on Tesla T4 (simulated). The limit is 2.0 MiB",
        '"2GiB"': "needs a card",
        'gpu="t44444"': "There is no GPU 't44444'",
        '"2GiBs", gpu="t4"': "is not a size",
        'gpu="t4", limits=3': "unexpected keyword argument 'limits'",
    }
    tests = [
        f"@pytest.mark.peak_memory({marker})\n"
        f"def test_{number}(peak_memory): peak_memory('test_vit', 1)\n"
        for number, marker in enumerate(markers)
    ]
    pytester.makepyfile("import pytest\n" + "\n".join(tests))
    result = run(pytester)
    result.assert_outcomes(passed=1, failed=len(markers) - 1)
    shown = result.stdout.str()
    for words in markers.values():
        assert words in shown
    assert "Traceback" not in shown
    assert "During handling" not in shown


def test_a_broken_baseline_is_one_sentence(tmp_path: Path) -> None:
    """It says what to do."""
    path = tmp_path / "baseline.json"
    path.write_text("[]")
    with pytest.raises(UsageError, match="is no baseline of memfit's"):
        Baselines(path)


@pytest.mark.rehearses
def test_an_unchanged_test_is_rehearsed(pytester: pytest.Pytester) -> None:
    """A test that trains on CUDA passes without a GPU, and fails when a layer doubles."""
    written(pytester, REHEARSED)
    run(pytester, "--memfit-update").assert_outcomes(passed=1)
    (peak,) = json.loads((pytester.path / "memfit-baseline.json").read_text())["peaks"].values()
    assert peak["source"] == "rehearsed"
    written(pytester, REHEARSED, hidden=4096)
    result = run(pytester)
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines([r"  \+.* 0, "])
