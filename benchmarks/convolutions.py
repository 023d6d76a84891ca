"""Compare the workspaces of convolutions on a real GPU with those of a rehearsal.

    python benchmarks/convolutions.py take FILE [--rehearse GPU]
    python benchmarks/convolutions.py compare REAL REHEARSED

`take` runs every different convolution of eleven timm models at three batch sizes, in fp32 and
bf16, in PyTorch's usual layout: forward, the input's gradient, the weight's gradient. It writes
what each asked the caching allocator for besides its outputs. With `--rehearse`, it does the same
on a card that is not there. `compare` prints in how many of them the two agree, up to 400 bytes.
"""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODELS = (
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "maxvit_tiny_tf_224",
    "mobilenetv3_large_100",
    "nfnet_f0",
    "regnety_032",
    "resnet18",
    "resnet50",
    "resnetv2_50",
    "vgg16",
)
BATCH_SIZES = (4, 16, 32)
IMAGE_SIZE = 224
KERNELS = ("forward", "data", "filter")
MASKS = {"data": [True, False, False], "filter": [False, True, False]}
CLOSE_BYTES = 400
FIELDS = ("input", "weight", "stride", "padding", "dilation", "groups", "dtype", *KERNELS)


def main() -> None:
    """Take the workspaces of one side, or compare two sides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    take = commands.add_parser("take")
    take.add_argument("file", type=Path)
    take.add_argument("--rehearse", metavar="GPU")
    compare = commands.add_parser("compare")
    compare.add_argument("real", type=Path)
    compare.add_argument("rehearsed", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "compare":
        print_comparison(arguments.real, arguments.rehearsed)
    elif arguments.rehearse is None:
        write_workspaces(arguments.file)
    else:
        from memfit.cards import find_gpu
        from memfit.rehearsal.activate import rehearsed_environment

        added = rehearsed_environment(find_gpu(arguments.rehearse), environment=os.environ)
        command = [sys.executable, __file__, "take", str(arguments.file)]
        sys.exit(subprocess.run(command, env={**os.environ, **added}, check=False).returncode)


def write_workspaces(path: Path) -> None:
    """Run each convolution on the device, and write what it asked for."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("This needs a CUDA device, and torch sees none. Give --rehearse GPU.")
    today = dt.datetime.now(tz=dt.timezone.utc).date()
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(
            f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN "
            f"{torch.backends.cudnn.version()}, {today}\n"
        )
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(FIELDS)
        for shapes in convolutions():
            for dtype in (torch.float32, torch.bfloat16):
                taken = [_workspace(kernel, shapes, dtype) for kernel in KERNELS]
                texts = ("x".join(map(str, numbers)) for numbers in shapes[:5])
                rows.writerow([*texts, shapes[5], str(dtype).removeprefix("torch."), *taken])
                file.flush()


def convolutions() -> Iterator[tuple[Any, ...]]:
    """Yield input shape, weight shape, stride, padding, dilation and groups of each once."""
    import timm
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found: dict[tuple[Any, ...], None] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.convolution.default:
                data, weight, _, stride, padding, dilation, *_, groups = args
                lists = (data.shape, weight.shape, stride, padding, dilation)
                found[(*map(tuple, lists), groups)] = None
            return func(*args, **(kwargs or {}))

    for name in MODELS:
        with torch.device("meta"):
            model = timm.create_model(name)
            for batch_size in BATCH_SIZES:
                with Watch(), torch.no_grad():
                    model(torch.empty(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE))
    yield from found


def _workspace(kernel: str, shapes: tuple[Any, ...], dtype: Any) -> int:
    import torch

    input_shape, weight_shape, *geometry, groups = shapes
    data = torch.ones(input_shape, device="cuda", dtype=dtype)
    weight = torch.ones(weight_shape, device="cuda", dtype=dtype)
    rest = (*map(list, geometry), False, [0, 0], groups)
    made: tuple[Any, ...] = (torch.ops.aten.convolution(data, weight, None, *rest),)
    if kernel == "forward":
        before = _asked()
        made = (torch.ops.aten.convolution(data, weight, None, *rest),)
    else:
        gradient = torch.ones_like(made[0])
        before = _asked()
        made = torch.ops.aten.convolution_backward(
            gradient, data, weight, [0], *rest, MASKS[kernel]
        )
    outputs = sum(tensor.nbytes for tensor in made if tensor is not None)
    return _asked() - before - outputs


def _asked() -> int:
    import torch

    return int(torch.cuda.memory_stats()["requested_bytes.all.allocated"])


def print_comparison(real_path: Path, rehearsed_path: Path) -> None:
    """Print how many workspaces agree, by kind of convolution and by kernel."""
    (real_title, real), (rehearsed_title, rehearsed) = map(_read, (real_path, rehearsed_path))
    print(f"real: {real_title}\nrehearsed: {rehearsed_title}\n")
    agree, all_of = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    sums = Counter[tuple[str, str]]()
    for key in real.keys() & rehearsed.keys():
        for kernel, ours, theirs in zip(KERNELS, rehearsed[key], real[key], strict=True):
            kind = (_kind(key), kernel)
            all_of[kind] += 1
            agree[kind] += abs(ours - theirs) <= CLOSE_BYTES
            sums[kind[0], "real"] += theirs
            sums[kind[0], "rehearsed"] += ours
    print("| convolution | kernel | agree | of |\n|---|---|---|---|")
    for kind in sorted(all_of):
        print(f"| {kind[0]} | {kind[1]} | {agree[kind]} | {all_of[kind]} |")
    print("\n| convolution | all workspaces, real, MiB | rehearsed, MiB |\n|---|---|---|")
    for name in dict.fromkeys(kind for kind, _ in sorted(all_of)):
        print(f"| {name} | {sums[name, 'real'] >> 20} | {sums[name, 'rehearsed'] >> 20} |")


def _kind(key: tuple[str, ...]) -> str:
    image, weight, stride, _, _, groups = key[:6]
    if groups != "1":
        return "grouped"
    if not weight.endswith("x1x1") or stride != "1x1":
        return "other"
    return "1x1, one pixel" if image.endswith("x1x1") else "1x1"


def _read(path: Path) -> tuple[str, dict[tuple[str, ...], list[int]]]:
    with path.open(encoding="utf-8") as file:
        title = file.readline().removeprefix("# ").strip()
        rows = list(csv.reader(file))[1:]
    return title, {tuple(row[:7]): [int(number) for number in row[7:]] for row in rows}


if __name__ == "__main__":
    main()
