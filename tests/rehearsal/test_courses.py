"""Whether the values that a script reads change its course."""

from __future__ import annotations

from pathlib import Path

import pytest

from memfit.records import ReadKind
from memfit.rehearsal.courses import Spot, changes_course

NUMBER, DECISION, TENSOR = ReadKind.NUMBER, ReadKind.DECISION, ReadKind.TENSOR


def spot(path: Path, source: str, *, has_columns: bool = True) -> Spot:
    """Write a source file and return the place of its `READ`."""
    path.write_text(source, encoding="utf-8")
    for number, line in enumerate(source.splitlines(), start=1):
        column = line.find("READ")
        if column >= 0:
            end = column + len("READ")
            return Spot(
                path=str(path),
                line=number,
                end_line=number,
                column=column if has_columns else None,
                end_column=end if has_columns else None,
            )
    raise AssertionError(source)


@pytest.mark.parametrize(
    ("kind", "source", "expected"),
    [
        (NUMBER, "print(READ)\n", False),
        (NUMBER, "if step % 2 == 0: print(READ)\n", False),
        (NUMBER, "if READ > 3:\n    x = model(x)\n", True),
        (NUMBER, "if READ > 3:\n    raise ValueError(x)\n", False),
        (NUMBER, "if READ > 3:\n    raise ValueError(x)\nelse:\n    step()\n", True),
        (NUMBER, "if READ > 3:\n    n = str(x)\n    if n:\n        warnings.warn(n)\n", False),
        (NUMBER, "if READ > 3:\n    n = len(x)\n    log(n)\ng(n)\n", True),
        (NUMBER, "if READ > best:\n    best = x\n    torch.save(best)\nprint(best)\n", False),
        (NUMBER, "if READ > best:\n    self.best = x\n", True),
        (NUMBER, "n = READ\nif n > 3:\n    print(n)\n", False),
        (NUMBER, "while (\n    x\n    and READ > 3\n):\n    pass\n", True),
        (NUMBER, "x = 1 if READ else 2\n", True),
        (NUMBER, "for i in range(READ):\n    pass\n", True),
        (NUMBER, "assert READ > 0\n", False),
        (DECISION, "assert READ\n", False),
        (NUMBER, "def f():\n    n = READ\n    if n == 0:\n        return\n", True),
        (NUMBER, "def f():\n    n = READ\n    print(n)\n", False),
        (NUMBER, "def f():\n    n = READ\ndef g(n):\n    if n:\n        return\n", False),
        (NUMBER, "loss = READ\nif not math.isfinite(loss):\n    quit()\n", False),
        (DECISION, "x = bool(READ)\n", True),
        (DECISION, "if torch.isnan(READ):\n    pass\n", False),
        (DECISION, "READ and print()\n", True),
        (TENSOR, "logged.append(READ)\n", False),
        (TENSOR, "for x in READ:\n    pass\n", True),
    ],
)
def test_by_its_source(tmp_path: Path, kind: ReadKind, source: str, expected: bool) -> None:
    """A condition decides what runs, unless it asks if a value is finite, or says something."""
    assert changes_course(kind, spot(tmp_path / "train.py", source)) is expected


def test_a_condition_is_tested_where_its_statement_begins(tmp_path: Path) -> None:
    """If a tensor is the condition, Python reports the place where its statement begins."""
    source = "if (\n    flag\n    and (mask == 0).all()\n):\n    mask = model()\n"
    path = tmp_path / "train.py"
    path.write_text(source, encoding="utf-8")
    at = Spot(path=str(path), line=1, end_line=5, column=0, end_column=8)
    assert changes_course(DECISION, at)
    path_of_nan = tmp_path / "nan.py"
    path_of_nan.write_text(source.replace("(mask == 0).all()", "torch.isnan(x)"), encoding="utf-8")
    assert not changes_course(DECISION, Spot(path=str(path_of_nan), line=1, end_line=5, column=0))


def test_without_columns_the_line_decides(tmp_path: Path) -> None:
    """Python 3.10 reports lines without columns."""
    source = "if READ > 3:\n    x = model()\n"
    assert changes_course(NUMBER, spot(tmp_path / "a.py", source, has_columns=False))
    assert not changes_course(NUMBER, spot(tmp_path / "b.py", "print(READ)\n", has_columns=False))


def test_without_a_source_the_kind_decides() -> None:
    """Without a source, a value used as a size decides what runs, and a number does not."""
    assert changes_course(ReadKind.SIZE, None)
    assert changes_course(DECISION, None)
    assert not changes_course(NUMBER, None)
