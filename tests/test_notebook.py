"""The notebook of the documentation runs from its first cell to its last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("default")
NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


def test_the_notebook_runs_and_its_results_show_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel of its own takes seconds to start. Two results are tables; the last is a plan's."""
    formats: Any = pytest.importorskip("nbformat", reason="it reads a notebook")
    client: Any = pytest.importorskip("nbclient", reason="it runs a notebook")
    pytest.importorskip("ipykernel", reason="a notebook's kernel")
    pytest.importorskip("fastai", reason="the notebook trains a Learner")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = formats.read(NOTEBOOK, as_version=4)
    client.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    shown = [
        output["data"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "execute_result"
    ]
    assert len(shown) == 3
    assert all("text/html" in data for data in shown[:2])
    assert shown[2]["text/plain"].startswith("((22, 21, 21), [")
