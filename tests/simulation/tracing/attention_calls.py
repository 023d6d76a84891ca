"""Calls of attention, of which torch is asked in a rehearsed process which kernel it takes.

`python attention_calls.py FILE` asks for all of them on the rehearsed card of its process.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# torch's numbers of its kernels.
_BACKENDS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HEAD_DIMS = ((4, 4), (20, 20), (64, 64), (64, 32), (80, 80), (128, 128), (160, 160), (192, 192))
_WIDE_HEAD_DIMS = ((192, 128), (224, 224), (256, 256), (264, 264))
_LENGTHS = ((1, 1), (1, 50), (50, 1), (50, 50), (50, 77))
_MASKS = (None, "bool", "float", "learned")
_DROPOUTS = (0.0, 0.1, 0.125)


def calls(device: str) -> Iterator[tuple[tuple[torch.Tensor, ...], dict[str, Any]]]:
    """Yield query, key and value, and the other arguments."""
    for (
        dtype,
        dims,
        lengths,
        is_causal,
        mask,
        dropout,
        key_heads,
        has_gradient,
    ) in itertools.product(
        _DTYPES,
        _HEAD_DIMS + _WIDE_HEAD_DIMS,
        _LENGTHS,
        (False, True),
        _MASKS,
        _DROPOUTS,
        (4, 2),
        (False, True),
    ):
        if mask is not None and (is_causal or (mask == "learned" and not has_gradient)):
            continue
        queries, keys = lengths
        yield (
            tuple(
                torch.empty(
                    2, length, heads, dim, dtype=dtype, device=device, requires_grad=has_gradient
                ).transpose(1, 2)
                for length, heads, dim in (
                    (queries, 4, dims[0]),
                    (keys, key_heads, dims[0]),
                    (keys, key_heads, dims[1]),
                )
            ),
            {
                "attn_mask": mask
                and torch.empty(
                    2,
                    4,
                    *lengths,
                    dtype=torch.bool if mask == "bool" else dtype,
                    device=device,
                    requires_grad=mask == "learned",
                ),
                "dropout_p": dropout,
                "is_causal": is_causal,
                "enable_gqa": key_heads < 4,
            },
        )


def asked() -> list[str]:
    """Return the kernel that torch takes for each call on this process's card."""
    choose: Any = torch._fused_sdp_choice
    return [_BACKENDS[choose(*tensors, **options)] for tensors, options in calls("cuda")]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(asked()))
