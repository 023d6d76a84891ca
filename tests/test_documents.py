"""Every line of README.md and docs/quickstart.md runs on a machine without a GPU.

Lines run as they are written, with smaller models and batches in place of the large ones. Searches
end at 16 samples. The tests define the names that a reader has (`dataset`, `MyModel`, `loader`).
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import memfit
from memfit.cli import main

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="about a machine without a GPU, whose answers differ"
)
ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/quickstart.md")
SMALLER = {
    "convnext_base": "test_convnext",
    "resnet50": "test_resnet",
    "resnet18": "test_resnet",
    "vit_base_patch16_224": "test_vit",
    "pretrained=True": "pretrained=False",
    "num_workers=8": "num_workers=0",
    "1024": "8",
    # A reader has a card. These lines run on the test's CPU instead.
    ".cuda()": "",
    'device="cuda"': 'device="cpu"',
}
NOT_OURS = ("make", "pip", "git", "python", "export", "cd", "#", "nvidia-smi", "eval", "source")


def blocks(document: str, *languages: str) -> Iterator[str]:
    """Yield the blocks of code of a document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if match[1] in languages:
            yield match[2]


def commands(document: str) -> list[str]:
    """Return the command lines of a document, each once, without prompts and comments."""
    joined = (block.replace("\\\n", " ") for block in blocks(document, "sh", "bash", "console"))
    lines = itertools.chain.from_iterable(
        [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
        or block.splitlines()
        for block in joined
    )
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def smaller(text: str) -> str:
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    return text


OURS = [
    (document, line)
    for document in DOCUMENTS
    for line in commands(document)
    if line.startswith("memfit ")
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_line_is_ours_or_known(document: str) -> None:
    """A line that is neither memfit's nor a known command would not be tested."""
    for line in commands(document):
        assert line.startswith(("memfit ", *NOT_OURS)), line


@pytest.mark.parametrize(("document", "line"), OURS)
def test_a_command_runs(
    document: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with exit code 0, or with 4 if `verify` finds batch norm."""
    words = shlex.split(smaller(line), comments=True)[1:]
    if words[0] == "rehearse":
        pytest.skip("tests/cli/test_rehearse_command.py runs commands under a rehearsal")
    if words[0] in {"probe", "plan"} and "--max-batch-size" not in words:
        words += ["--max-batch-size", "16"]
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, words)
    allowed = {0, 4} if words[0] == "verify" else {0}
    assert result.exit_code in allowed, f"{document}: {line}\n{result.output}"


class MyModel(nn.Module):
    """Stands for the model of a reader."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, 4), whatever the shape (samples, ...) of numbers."""
        flat = x.float().flatten(1)
        scores: torch.Tensor = self.body(flat[:, :6])
        return scores


def loss_of(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return a loss for targets that are classes, or tokens."""
    classes = targets if targets.ndim == 1 else targets[:, 0]
    return nn.functional.cross_entropy(outputs, classes % 4)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_python_runs_from_top_to_bottom(document: str) -> None:
    """All blocks run in one session, as if a reader had pasted them."""
    images = TensorDataset(torch.randn(16, 3, 32, 32), torch.randint(10, (16,)))
    rows = TensorDataset(torch.randn(16, 6), torch.randint(4, (16,)))
    model = MyModel()
    names: dict[str, Any] = {
        "torch": torch,
        "timm": timm,
        "memfit": memfit,
        "DataLoader": DataLoader,
        "MyModel": MyModel,
        "dataset": images,
        "loader": DataLoader(rows, batch_size=8),
        "model": model,
        "inputs": rows.tensors[0],
        "targets": rows.tensors[1],
        "loss": loss_of,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    for block in blocks(document, "python"):
        code = smaller(block)
        if "memfit.rehearse(" in code:
            continue  # only before torch is imported; tests/rehearsal run it in processes
        # A loop's `loss` is a number; in the next block it is the reader's loss again.
        names["loss"] = loss_of
        own = names if "MyModel" not in code else {**names, "loader": DataLoader(rows, 8)}
        exec(compile(code, document, "exec"), own)  # noqa: S102 - that is the test
        if "MyModel" in code:
            names = {**names, "model": own["model"], "optimizer": own["optimizer"], "dataset": rows}
