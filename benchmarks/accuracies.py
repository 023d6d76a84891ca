"""Make memfit/accuracies.csv from timm's published results.

    python benchmarks/accuracies.py FOLDER [--output FILE]

FOLDER is a clone of huggingface/pytorch-image-models, bare or not. The table is read from its
results/results-imagenet.csv at HEAD. The commit and the date of that file go into the first lines.
"""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
from pathlib import Path

_FILE = "results/results-imagenet.csv"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, default=Path("memfit/accuracies.csv"))
    arguments = parser.parse_args()

    def git(*command: str) -> str:
        run = ["git", "-C", str(arguments.folder), *command]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout

    commit, date = git("log", "-1", "--format=%H %cs", "--", _FILE).split()
    rows = list(csv.DictReader(io.StringIO(git("show", f"HEAD:{_FILE}"))))
    with arguments.output.open("w", encoding="utf-8", newline="\n") as file:
        file.write(
            "# Top-1 accuracy on ImageNet's validation set, as timm publishes it in\n"
            f"# github.com/huggingface/pytorch-image-models, {_FILE},\n"
            f"# of {date} (commit {commit[:12]}).\n"
        )
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "image_size", "top1_percent"])
        writer.writerows((row["model"], row["img_size"], row["top1"]) for row in rows)
    print(f"{len(rows)} rows of {date} in {arguments.output}")


if __name__ == "__main__":
    main()
