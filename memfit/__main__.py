"""Start the command line: `memfit` and `python -m memfit`."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

__all__ = ["start"]


def start() -> NoReturn:
    """Run the command line; Ctrl-C before it is loaded ends with one sentence too."""
    try:
        from memfit.cli import run
    except KeyboardInterrupt:
        sys.stderr.write("memfit: interrupted before it began.\n")
        sys.stderr.flush()
        os._exit(130)
    run()


if __name__ == "__main__":
    start()
