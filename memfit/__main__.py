"""Run the command line: `python -m memfit`."""

from memfit.cli import run

if __name__ == "__main__":
    run()
