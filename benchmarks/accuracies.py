"""Make memfit/accuracies.csv from timm's published results, with the licences of the weights.

    python benchmarks/accuracies.py FOLDER [--output FILE]

FOLDER is a clone of huggingface/pytorch-image-models, bare or not. The table is read from its
results/results-imagenet.csv at HEAD. The commit and the date of that file go into the first lines.
The licences are those that the installed timm has in its configurations.
"""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
from pathlib import Path

import timm

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
            f"# Licences of the weights as in the configurations of timm {timm.__version__}.\n"
        )
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "image_size", "top1_percent", "licence"])
        writer.writerows(
            (row["model"], row["img_size"], row["top1"], licence(row["model"])) for row in rows
        )
    print(f"{len(rows)} rows of {date} in {arguments.output}")


def licence(model: str) -> str:
    """Return the licence of a model's weights, `unknown` if timm names none.

    Args:
        model: The model's name with the tag of its weights.
    """
    config = timm.models.get_pretrained_cfg(model)
    return (None if config is None else config.license) or "unknown"


if __name__ == "__main__":
    main()
