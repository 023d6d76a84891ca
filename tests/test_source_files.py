"""Files stay short, and the folders of memfit show its architecture."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
# A library that pages carry is not written by hand.
NOT_WRITTEN_HERE = ".min.js"
MAX_LINES = 450
MAX_LOOSE_MODULES = 8


def test_no_file_is_longer_than_450_lines() -> None:
    """A longer file has two subjects. CONTRIBUTING.md has this rule."""
    files = [
        path
        for folder in ("memfit", "tests", "benchmarks", "examples")
        for suffix in ("py", "c", "h", "js")
        for path in (ROOT / folder).rglob(f"*.{suffix}")
        if not path.name.endswith(NOT_WRITTEN_HERE)
    ]
    lengths = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in files
    }
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}
    assert len(lengths) > 200


def test_memfit_has_at_most_eight_modules_beside_its_packages() -> None:
    """What grows goes into a package."""
    modules = {path.name for path in (ROOT / "memfit").glob("*.py")} - {"__init__.py"}
    assert "cards.py" in modules
    assert len(modules) <= MAX_LOOSE_MODULES
