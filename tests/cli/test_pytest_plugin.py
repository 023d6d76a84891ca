"""The pytest plugin, in test runs of its own."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from memfit.errors import UsageError
from memfit.profiling.baselines import Baselines

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


class Reports:
    """What an inner run of pytest said of each test."""

    def __init__(self) -> None:
        self.all: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.all.append(report)


def run(folder: Path, text: str, *arguments: str) -> list[pytest.TestReport]:
    """Run a file of tests in this process, which has imported torch already."""
    (folder / "test_it.py").write_text(text)
    seen = Reports()
    options = ("--import-mode=importlib", "--rootdir", str(folder), str(folder / "test_it.py"))
    before = set(sys.modules)
    pytest.main([*PLUGIN, *options, *arguments], plugins=[seen])
    for name in set(sys.modules) - before:
        # Otherwise the next run takes the module of this one.
        if str(folder) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]
    return seen.all


def filled(text: str, **values: object) -> str:
    return text.format(**{"hidden": 256, "times": 1, "limit": "", **values})


def test_ten_runs_are_alike_and_a_doubled_layer_fails(tmp_path: Path) -> None:
    """The failure says what grew, by module and role; the file of peaks is not changed."""
    reports = run(tmp_path, filled(SIMULATED, times=10), "--memfit-update")
    assert [report.outcome for report in reports] == ["passed"] * 10
    assert len({report.capstdout for report in reports}) == 1
    assert "PEAK" in reports[0].capstdout
    kept = (tmp_path / "memfit-baseline.json").read_text()
    (report,) = run(tmp_path, filled(SIMULATED, hidden=512))
    assert report.outcome == "failed"
    assert re.search(r"The peak of .*test_step.*; kept: .*1% is allowed", report.longreprtext)
    assert re.search(r"  \+.* encoder, parameters: .* -> ", report.longreprtext)
    assert (tmp_path / "memfit-baseline.json").read_text() == kept


def test_limits_and_mistakes(tmp_path: Path) -> None:
    """Each fails its test with one sentence, and no traceback."""
    markers = {
        '"2GiB", gpu="t4"': "",
        '"2MiB", gpu="t4"': "of it for the CUDA context. The limit is 2.0 MiB",
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
    reports = run(tmp_path, "import pytest\n" + "\n".join(tests))
    assert [report.outcome for report in reports] == ["passed"] + ["failed"] * (len(markers) - 1)
    for report, words in zip(reports, markers.values(), strict=True):
        assert words in report.longreprtext
        assert "Traceback" not in report.longreprtext
        assert "During handling" not in report.longreprtext


def test_a_broken_baseline_is_one_sentence(tmp_path: Path) -> None:
    """It says what to do."""
    path = tmp_path / "baseline.json"
    path.write_text("[]")
    with pytest.raises(UsageError, match="is no baseline of memfit's"):
        Baselines(path)


@pytest.mark.rehearses
def test_an_unchanged_test_is_rehearsed(tmp_path: Path) -> None:
    """A test that trains on CUDA passes without a GPU, and fails when a layer doubles."""
    (report,) = run(tmp_path, filled(REHEARSED), "--memfit-update")
    assert report.outcome == "passed", report.longreprtext
    (peak,) = json.loads((tmp_path / "memfit-baseline.json").read_text())["peaks"].values()
    assert peak["source"] == "rehearsed"
    (report,) = run(tmp_path, filled(REHEARSED, hidden=4096))
    assert report.outcome == "failed"
    assert re.search(r"  \+.* 0, ", report.longreprtext), report.longreprtext
