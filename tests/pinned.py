"""The release of torch whose bytes the tests know exactly. Others differ in what they keep."""

from __future__ import annotations

from typing import Final

import torch

PINNED: Final = "2.15.0"
IS_PINNED: Final = torch.__version__.startswith(PINNED)
