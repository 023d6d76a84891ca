"""Compare memfit with other tools: the same model, the same limit, each in its own process.

    python benchmarks/peers.py                      # ResNet-18 on the CPU under 1500 MiB
    python benchmarks/peers.py --device cuda --memory-mib 8192

On a CPU the limit is RLIMIT_DATA, in addition to what the process holds after it has imported its
tool. On a GPU it is a cap on the caching allocator. Every process on the CPU gets the same
environment with glibc's mmap threshold fixed, so that all have one true answer (`heap.py` shows
what happens without it). `--default-heap` leaves the threshold alone. The true largest size is
found without any tool: by plain steps in a fresh process for each batch size.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import json
import logging
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

MIB = 2**20
TOOLS = ("memfit", "accelerate", "lightning-power", "lightning-binsearch", "batch-finder")
STEADY_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}


@dataclasses.dataclass
class Task:
    """One model under one limit, with the results of its trials."""

    model: str
    image_size: int
    device: str
    memory_mib: int
    sizes: list[int] = dataclasses.field(default_factory=list)

    def limit(self) -> None:
        """Limit this process to this much more memory than it has."""
        import torch

        if self.device != "cpu":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(self.memory_mib * MIB / total)
            return
        # The thread pool and late imports of torch belong to the loaded process.
        torch.ones(torch.get_num_threads() * MIB).add_(1)
        weight = torch.nn.Parameter(torch.ones(1))
        weight.sum().backward()
        torch.optim.AdamW([weight]).step()
        limit = data_bytes() + self.memory_mib * MIB
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))

    def build(self) -> Any:
        """Return the model on its device."""
        import timm

        return timm.create_model(self.model).to(self.device)

    def batch(self, size: int) -> Any:
        """Return images of shape (size, 3, H, W) and classes of shape (size,)."""
        import torch

        shape = (size, 3, self.image_size, self.image_size)
        images = torch.randn(shape, device=self.device)
        return images, torch.randint(1000, (size,), device=self.device)

    def train(self, model: Any, size: int, num_steps: int = 3) -> None:
        """Take steps of SGD with momentum, as a user's loop does."""
        import torch

        self.sizes.append(size)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(num_steps):
            images, classes = self.batch(size)
            torch.nn.functional.cross_entropy(model(images), classes).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def data_bytes() -> int:
    """Return the bytes that RLIMIT_DATA counts."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmData in /proc/self/status")


def run_memfit(task: Task) -> tuple[Any, Callable[[], int | None]]:
    """Probe a live model through the library, to see whether it changes; see `command_line`."""
    import torch

    import memfit

    # memfit sets the same limit itself, in the processes of its trials.
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    model = task.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss = torch.nn.functional.cross_entropy
    live = memfit.Workload(model, task.batch, loss, optimizer)

    def search() -> int:
        result = memfit.probe(live, device="cpu", memory="1GiB", precision="fp32", max_batch_size=2)
        return result.max_batch_size

    return model, search


def command_line(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run `memfit probe` as a user does, and time the whole of it."""
    command = [sys.executable, "-m", "memfit", "probe", arguments.model, "--json"]
    command += ["--device", arguments.device, "--memory", f"{arguments.memory_mib}MiB"]
    command += ["--precision", "fp32", "--optimizer", "momentum"]
    command += ["--image-size", str(arguments.image_size)]
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment(arguments)
    )
    seconds = time.perf_counter() - start
    (result,) = json.loads(done.stdout)["results"]
    return {
        "found": result["max_batch_size"],
        "sizes": [trial["batch_size"] for trial in result["trials"]],
        "seconds": result["seconds"],
        "wall_seconds": seconds,
    }


def run_accelerate(task: Task) -> tuple[Any, Callable[[], int | None]]:
    """Decorate the user's loop; start at 128, the default."""
    from accelerate.utils import find_executable_batch_size

    model = task.build()

    @find_executable_batch_size(starting_batch_size=128)
    def train(batch_size: int) -> int:
        task.train(model, batch_size)
        return batch_size

    return model, train


def run_lightning(task: Task, mode: str) -> tuple[Any, Callable[[], int | None]]:
    """Tune a minimal module with the trainer's defaults."""
    import pytorch_lightning as lightning
    import torch
    from pytorch_lightning.tuner import Tuner

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    net = task.build()

    class Images(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 10_000

        def __getitem__(self, index: int) -> Any:
            return torch.randn(3, task.image_size, task.image_size), index % 1000

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.batch_size = 2

        def training_step(self, batch: Any, _index: int) -> Any:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

        def train_dataloader(self) -> Any:
            if not task.sizes or task.sizes[-1] != self.batch_size:
                task.sizes.append(self.batch_size)
            return torch.utils.data.DataLoader(Images(), batch_size=self.batch_size)

    def search() -> int | None:
        trainer = lightning.Trainer(
            accelerator="cpu" if task.device == "cpu" else "gpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        return Tuner(trainer).scale_batch_size(Module(), mode=mode)

    return net, search


def run_batch_finder(task: Task) -> tuple[Any, Callable[[], int | None]]:
    """Give it the model and the shape; it trains the forward's mean without an optimizer."""
    import torch
    from batch_finder import find_max_minibatch

    model = task.build()
    model.register_forward_pre_hook(lambda _, inputs: task.sizes.append(inputs[0].shape[0]))

    def search() -> int | None:
        found = find_max_minibatch(
            lambda: model,
            input_shapes=(-1, 3, task.image_size, task.image_size),
            forward_params=["x"],
            device=torch.device(task.device),
            use_subprocess=False,
        )
        return found[0] if isinstance(found, tuple) else found

    return model, search


def run_tool(tool: str, task: Task) -> dict[str, Any]:
    """Run one tool in this process and return the result."""
    warnings.filterwarnings("ignore")
    import timm  # noqa: F401
    import torch

    imports = {
        "memfit": "memfit.api",
        "accelerate": "accelerate.utils",
        "batch-finder": "batch_finder",
    }
    __import__(imports.get(tool, "pytorch_lightning"))
    task.limit()
    runners: dict[str, Callable[[Task], tuple[Any, Callable[[], int | None]]]] = {
        "memfit": run_memfit,
        "accelerate": run_accelerate,
        "lightning-power": lambda task: run_lightning(task, "power"),
        "lightning-binsearch": lambda task: run_lightning(task, "binsearch"),
        "batch-finder": run_batch_finder,
    }
    model, search = runners[tool](task)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    found, crash = None, None
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found = search()
        except Exception as error:  # noqa: BLE001 - that a tool crashes is a result
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
            crash = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    seconds = time.perf_counter() - start
    wall = time.time() - psutil.Process().create_time()
    after = model.state_dict().values()
    same = all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    return {
        "tool": tool,
        "found": found,
        "sizes": task.sizes,
        "seconds": seconds,
        "wall_seconds": wall,
        "crash": crash,
        "state_changed": not same,
    }


def try_plainly(task: Task, size: int) -> dict[str, Any]:
    """Try one batch size in this process, without any tool."""
    import timm  # noqa: F401

    task.limit()
    try:
        task.train(task.build(), size)
    except (RuntimeError, MemoryError):
        return {"fits": False}
    return {"fits": True}


def environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the environment that every tool gets."""
    steady = arguments.device == "cpu" and not arguments.default_heap
    return {**os.environ, **(STEADY_HEAP if steady else {})}


def in_process(arguments: argparse.Namespace, *extra: str) -> dict[str, Any]:
    """Run this script again in a fresh process and return its last line."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--model",
        arguments.model,
        "--image-size",
        str(arguments.image_size),
        "--device",
        arguments.device,
        "--memory-mib",
        str(arguments.memory_mib),
        *extra,
    ]
    # If Lightning crashes, it leaves a checkpoint in its folder.
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment(arguments),
            check=False,
            cwd=folder,
        )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"crash": f"exit code {done.returncode}: {last[:80]}", "fits": False}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def true_largest(arguments: argparse.Namespace, near: int) -> int:
    """Return the largest batch size that fits, by plain steps in fresh processes."""

    def fits(size: int) -> bool:
        return bool(in_process(arguments, "--try", str(size))["fits"])

    low = near
    while low > 0 and not fits(low):
        low -= 1
    while fits(low + 1):
        low += 1
    return low


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--device", default=None, help="cpu or cuda; by default the GPU if any")
    parser.add_argument("--memory-mib", type=int, default=1500)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--default-heap", action="store_true")
    parser.add_argument("--tool", choices=TOOLS, help=argparse.SUPPRESS)
    parser.add_argument("--try", dest="size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    task = Task(arguments.model, arguments.image_size, arguments.device, arguments.memory_mib)
    if arguments.tool:
        print(json.dumps(run_tool(arguments.tool, task)))
        return
    if arguments.size:
        print(json.dumps(try_plainly(task, arguments.size)))
        return
    rows = [(tool, in_process(arguments, "--tool", tool)) for tool in arguments.tools]
    rows = [
        (tool, {**row, **command_line(arguments)} if tool == "memfit" else row)
        for tool, row in rows
    ]
    near = max((row.get("found") or 1 for _, row in rows), default=1)
    report(arguments, rows, true_largest(arguments, near))


def report(
    arguments: argparse.Namespace, rows: list[tuple[str, dict[str, Any]]], truth: int
) -> None:
    """Print the table in Markdown, with where and when."""
    import timm
    import torch

    heap = ""
    if arguments.device == "cpu":
        heap = (
            ", glibc's heap with its defaults"
            if arguments.default_heap
            else f", {'='.join(*STEADY_HEAP.items())} for all"
        )
    where = (
        torch.cuda.get_device_name()
        if arguments.device != "cpu"
        else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    )
    print(
        f"{arguments.model} at {arguments.image_size} px, fp32, SGD with momentum, "
        f"{arguments.memory_mib} MiB{heap}; {where}, torch {torch.__version__}, timm "
        f"{timm.__version__}, {dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}.\n"
    )
    print(f"The largest batch size that fits, by plain steps in fresh processes: {truth}.\n")
    columns = "tool | found | of the true | trials | ran out | s in all | s searching"
    print(f"| {columns} | state changed | crashed |")
    print("|---|---|---|---|---|---|---|---|---|")
    for tool, row in rows:
        found, sizes = row.get("found"), row.get("sizes") or []
        share = "" if not found else f"{found / truth:.0%}"
        over = sum(size > truth for size in sizes)
        print(
            f"| {tool} | {found or 'nothing'} | {share} | {len(sizes)} | {over} "
            f"| {_wall(row):.0f} | {row.get('seconds', float('nan')):.0f} "
            f"| {'yes' if row.get('state_changed') else 'no'} "
            f"| {row.get('crash') or 'no'} |"
        )
    seconds = {tool: _wall(row) for tool, row in rows}
    ours, power = seconds.get("memfit"), seconds.get("lightning-power")
    if ours and power:
        print(f"\nmemfit's seconds in all over Lightning power's: {ours / power:.2f}.")


def _wall(row: dict[str, Any]) -> float:
    """Return the seconds from the start of a process to its answer."""
    return float(row.get("wall_seconds", math.nan))


if __name__ == "__main__":
    main()
