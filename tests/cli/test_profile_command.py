"""`memfit profile` as a user calls it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from memfit.cli import main

STEP = ("test_vit.r160_in1k", "--image-size", "96")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["profile", *STEP, *arguments])


def test_every_output_at_once(tmp_path: Path) -> None:
    """The terminal, a page, a picture and a snapshot come from one simulation."""
    files = {name: tmp_path / f"out.{name}" for name in ("html", "svg", "pickle")}
    result = run(
        "--batch-size", "8", "--gpu", "rtx3090", "--gpu", "t4",
        "--html", str(files["html"]), "--plot", str(files["svg"]),
        "--snapshot", str(files["pickle"]),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "test_vit.r160_in1k on NVIDIA GeForce RTX 3090, 8 samples" in result.output
    assert "Tesla T4" in result.output
    assert "What would free most at the peak (simulated)" in result.output
    assert max(map(len, result.output.splitlines())) <= 80
    assert files["html"].read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "</svg>" in files["svg"].read_text(encoding="utf-8")
    snapshot = pickle.loads(files["pickle"].read_bytes())  # noqa: S301 - written above
    assert snapshot["device_traces"][0]


def test_json_has_the_documented_keys() -> None:
    """The schema that docs/profile.md describes."""
    result = run("--batch-size", "4", "--gpu", "rtx3090", "--json")
    (found,) = json.loads(result.output)["results"]
    assert found["schema_version"] == 1
    assert set(found) == {
        "schema_version", "subject", "device", "source", "options", "batch_size",
        "num_micro_batches", "capacity", "outcome", "message", "timeline", "peak", "blocks",
        "cards", "advice", "seconds", "torch_version", "bytes_per_sample", "fixed_bytes",
        "peak_reserved_bytes",
    }  # fmt: skip
    documented = (Path(__file__).parents[2] / "docs" / "profile.md").read_text(encoding="utf-8")
    for record in (found, found["peak"], found["timeline"], found["blocks"][0], found["cards"][0]):
        for key in record:
            assert f"`{key}`" in documented
    total = found["peak"]["total_bytes"]
    assert sum(share["num_bytes"] for share in found["peak"]["roles"]) == total


def test_what_does_not_fit_ends_with_3() -> None:
    """The profile is shown all the same, with what is missing."""
    result = run("--batch-size", "64", "--gpu", "any", "--memory", "510MiB")
    assert result.exit_code == 3
    assert "It does not fit" in result.output
    assert "Largest blocks at the peak" in result.output


def test_the_step_on_this_machine() -> None:
    """Without a card the step runs on the CPU and is recorded."""
    result = run("--batch-size", "2", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "· measured" in result.output
    assert "Cards" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="the step would run on the GPU")
def test_without_a_gpu_one_is_simulated_and_said() -> None:
    """The command names neither a card nor a device."""
    result = run("--batch-size", "4")
    assert result.exit_code == 0
    assert "so memfit profiles the step on an NVIDIA GeForce RTX 4090" in result.stderr
    assert "on NVIDIA GeForce RTX 4090, 4 samples" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--html", "nowhere/out.html"), "nowhere/out.html cannot be written: there is no folder"),
        (("--plot", "out.gif"), "out.gif has no ending of a picture"),
        (("--gpu", "rtx3091"), "There is no GPU 'rtx3091'"),
        (("--batch-size", "0"), "The batch size must be at least 1, not 0."),
    ],
)
def test_mistakes_are_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    """The exit code is 2, and nothing is traced."""
    result = run("--batch-size", "8", "--gpu", "rtx3090", *arguments)
    assert result.exit_code == 2
    assert sentence in result.output
    assert result.output.count("\n") == 1


def test_a_cpu_has_no_snapshot_and_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The error comes before a step is recorded."""
    monkeypatch.setattr(
        "memfit.api.profiling.profile_device", lambda *_args: pytest.fail("it recorded")
    )
    result = run(
        "--batch-size", "2", "--device", "cpu", "--snapshot", str(tmp_path / "history.pickle")
    )
    assert result.exit_code == 2
    assert "A CPU has no caching allocator" in result.output
    assert list(tmp_path.iterdir()) == []


def test_help_offers_memory_for_cards_only() -> None:
    """A recording on a device has no limit."""
    assert "Memory that each --gpu has" in " ".join(run("--help").output.split())


def test_a_peak_above_the_baseline_ends_with_code_5(tmp_path: Path) -> None:
    """The first run keeps the peak; an equal one passes; a lower one that is kept fails."""
    baseline = tmp_path / "peaks.json"
    step = ("test_vit", "--batch-size", "8", "--precision", "fp32")
    asked = ("profile", *step, "--gpu", "t4", "--engine", "simulate", "--baseline", str(baseline))
    first = CliRunner().invoke(main, [*asked])
    assert first.exit_code == 0, first.output
    assert "It is kept there now." in first.stderr
    assert CliRunner().invoke(main, [*asked]).exit_code == 0
    kept = json.loads(baseline.read_text())
    (peak,) = kept["peaks"].values()
    peak["total_bytes"] //= 2
    name = next(key for key in peak["shares"] if key.startswith("blocks.0.mlp.fc1 "))
    peak["shares"][name] //= 2
    baseline.write_text(json.dumps(kept))
    grown = CliRunner().invoke(main, [*asked])
    assert grown.exit_code == 5
    assert "blocks.0.mlp.fc1" in grown.stderr


def test_a_peak_of_another_step_is_kept_beside_the_first(tmp_path: Path) -> None:
    """The message names the nearest, in case it was meant; what does not fit is not kept."""
    baseline = tmp_path / "peaks.json"
    asked = ("profile", "test_vit", "--engine", "simulate", "--baseline", str(baseline))
    for card in ("t4", "rtx3090"):
        last = CliRunner().invoke(main, [*asked, "--batch-size", "8", "--gpu", card])
        assert last.exit_code == 0, last.output
    assert "kept there now, beside 1 other (the nearest is of test_vit at batch" in last.stderr
    again = CliRunner().invoke(main, [*asked, "--batch-size", "8", "--gpu", "t4"])
    assert "it has not grown" in again.stderr
    before = baseline.read_text()
    large = CliRunner().invoke(
        main, [*asked, "--batch-size", "4096", "--gpu", "any", "--memory", "1GiB"]
    )
    assert large.exit_code == 3
    assert "its peak is not kept" in large.stderr
    assert baseline.read_text() == before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[1]",
        '{"schema_version": 1, "results": []}',
        '{"schema_version": 1, "peaks": {"a": {}}}',
        '{"schema_version": 1, "peaks": {"a": 3}}',
        (
            '{"schema_version": 1, "peaks": {"a": {"total_bytes": "1", "source": "simulated",'
            ' "torch_version": "2", "shares": {}}}}'
        ),
        (
            '{"schema_version": 1, "peaks": {"a": {"total_bytes": 1, "source": "simulated",'
            ' "torch_version": "2", "shares": {"fc nothing": 1}}}}'
        ),
        '{"schema_version": 99, "peaks": {}}',
    ],
)
def test_a_file_that_is_no_baseline_is_refused_before_the_work(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence says what to do, and the file is as it was."""
    monkeypatch.setattr("memfit.api.profile", lambda *_args, **_more: pytest.fail("it ran"))
    path = tmp_path / "peaks.json"
    path.write_text(text)
    result = run("--batch-size", "8", "--gpu", "t4", "--baseline", str(path))
    assert result.exit_code == 2, result.output
    assert "delete it and run again to write one." in result.stderr
    assert path.read_text() == text
