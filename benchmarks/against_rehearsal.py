"""Lay simulated training steps beside rehearsed ones, operator by operator.

    python benchmarks/against_rehearsal.py vit_base_patch16_224 swin_tiny_patch4_window7_224
    python benchmarks/against_rehearsal.py --families --table
    python benchmarks/against_rehearsal.py --families --table --sample 120

A rehearsal runs torch's own CUDA software in a process of its own. Its allocator records each
request of the third iteration with the stack that led to it. The simulation's requests are laid
beside these. The table says how many differ. Every operator whose requests differ is printed, with
its bytes. The workspaces of convolutions are listed apart, because they are cuDNN's choice and not
torch's.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import difflib
import itertools
import os
import platform
import random
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

BATCH_SIZES = (2, 8)
PRECISIONS = ("fp32", "amp-bf16", "amp-fp16")
PURE_PRECISIONS = ("bf16",)
LAYOUTS = ("contiguous", "channels-last")
OPTIMIZERS = ("adamw", "momentum")
_WITHOUT_CLASSES = ("eva02_tiny_patch14_224",)
NUM_CLASSES = 1000
CUDNN = "cuDNN workspace"
NUM_SHOWN = 6
GRANULARITY_BYTES = 512  # the allocator rounds every request up to this


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request to an allocator.

    Args:
        operator: What asked for it.
        num_bytes: What was asked for.
    """

    operator: str
    num_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one side says of a step: the requests of its third iteration, and its peaks."""

    requests: tuple[Request, ...]
    at_peak: Counter[str]
    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int


def main() -> None:
    """Print where the two sides differ, for every setting that was asked for."""
    arguments = _arguments()
    # Exported names are enough, and found quickly.
    os.environ["TORCH_SYMBOLIZE_MODE"] = "dladdr"
    from memfit.backends.rehearsed import RehearsalServers, RehearsedBackend
    from memfit.cards import find_gpu
    from memfit.rehearsal.activate import rehearsed_environment

    card = find_gpu(arguments.gpu)
    _print_header(card.name)
    rows: list[tuple[Side, Side] | None] = []
    with RehearsalServers(lambda c: rehearsed_environment(c, environment=os.environ)) as servers:
        for name, options in _drawn(arguments):
            with RehearsedBackend(card, servers) as backend:
                rows += [
                    _compared(
                        backend, name, options, batch_size, shows_operators=not arguments.table
                    )
                    for batch_size in arguments.batch_sizes
                ]
    _print_distribution([row for row in rows if row is not None])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="timm's names")
    parser.add_argument("--families", action="store_true", help="a small model of each family")
    parser.add_argument("--gpu", default="RTX 3090")
    known = (*PRECISIONS, *PURE_PRECISIONS)
    parser.add_argument("--precisions", nargs="*", metavar="PRECISION", choices=known)
    parser.add_argument("--layouts", nargs="*", metavar="LAYOUT", choices=LAYOUTS)
    parser.add_argument("--optimizers", nargs="*", metavar="OPTIMIZER")
    parser.add_argument("--batch-sizes", nargs="*", type=int, metavar="SAMPLES")
    parser.add_argument(
        "--sample", type=int, metavar="N", help="so many steps, drawn from all those named"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="only the totals, without operators")
    arguments = parser.parse_args()
    for name, of_sample, alone in (
        ("precisions", PRECISIONS, ("amp-bf16",)),
        ("layouts", LAYOUTS, ("contiguous",)),
        ("optimizers", OPTIMIZERS, ("adamw",)),
        ("batch_sizes", BATCH_SIZES, (8,)),
    ):
        if getattr(arguments, name) is None:
            setattr(arguments, name, alone if arguments.sample is None else of_sample)
    return arguments


def _drawn(arguments: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    steps = list(_steps(arguments))
    if arguments.sample is None:
        return steps
    return random.Random(arguments.seed).sample(steps, arguments.sample)  # noqa: S311 - a sample


def _steps(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    from memfit.records import Precision

    models: list[tuple[str, int | None]] = [(name, None) for name in arguments.models]
    if arguments.families:
        import equivalence

        models += [(name, side) for _, name, side in equivalence.FAMILIES]
    for (name, side), precision, layout, optimizer in itertools.product(
        models, arguments.precisions, arguments.layouts, arguments.optimizers
    ):
        options = {
            "precision": Precision(precision),
            "channels_last": layout == "channels-last",
            "optimizer": optimizer,
        }
        if name in _WITHOUT_CLASSES:
            options["num_classes"] = NUM_CLASSES
        yield name, options if side is None else {**options, "image_size": (side, side)}


def _compared(
    backend: Any, name: str, options: dict[str, Any], batch_size: int, *, shows_operators: bool
) -> tuple[Side, Side] | None:
    import against_rehearsal  # this file, under the name by which the other process finds it

    from memfit.errors import MemfitError
    from memfit.records import StepOptions
    from memfit.step.training_step import TrainingStep

    step = TrainingStep(subject=name, options=StepOptions(**options))
    layout = "NHWC" if options["channels_last"] else "NCHW"
    setting = f"{options['precision'].value} {layout} {options['optimizer']}"
    try:
        real = backend.call(against_rehearsal.rehearsed, step, batch_size)
        simulated = _simulated(backend.gpu, step, batch_size)
    except (MemfitError, RuntimeError, AssertionError) as error:
        print(f"| {name} | {setting} | {batch_size} | {str(error).splitlines()[0]} |", flush=True)
        return None
    print(_row(name, setting, batch_size, real, simulated), flush=True)
    if shows_operators:
        _print_differences(real, simulated)
    return real, simulated


# --- the two sides ------------------------------------------------------------------------------


def rehearsed(backend: Any, step: Any, batch_size: int) -> Side:
    """Run a step in the process that rehearses, and return what it asked for."""
    import gc

    import torch

    trial = backend.trial(step, batch_size)
    if not trial.fits:
        raise RuntimeError(trial.message)
    backend.__exit__()
    prepared = step.prepare(torch.device("cuda"))
    prepared.begin()
    for _ in range(2):
        prepared.iterate(batch_size)
    gc.collect()
    torch.cuda.synchronize()
    memory: Any = torch.cuda.memory
    memory._record_memory_history(max_entries=10**6, stacks="all", context="alloc")
    prepared.iterate(batch_size)
    entries = memory._snapshot()["device_traces"][0]
    memory._record_memory_history(enabled=None)
    events = [
        (entry["action"], entry["addr"], entry["size"], _operator(entry.get("frames", ())))
        for entry in entries
        if entry["action"] in ("alloc", "free_completed")
    ]
    prepared.end()
    return _side(events, trial)


def _operator(frames: Sequence[dict[str, Any]]) -> str:
    """Return the innermost operator of a stack; names of torch's own functions say the rest."""
    names = [str(frame["name"]).partition("(")[0] for frame in frames]
    if any("run_single_conv" in name or "run_conv_plan" in name for name in names):
        return CUDNN
    if names and any("convolution" in name for name in names) and not any(map(_is_made, names)):
        return CUDNN
    for name in names:
        if "Workspace" in name:
            return name.rpartition("::")[2]
    inner = next((n for n in names if n.startswith("at::native::") and "empty" not in n), "")
    operators = [name for name in names if name.startswith("at::_ops::")]
    outer = next((n.split("::")[2] for n in operators if "empty" not in n), "")
    return f"{outer} {inner.rpartition('::')[2]}".strip() or "?"


def _is_made(name: str) -> bool:
    """Whether a function of torch's makes a tensor, in place of a library's workspace."""
    return any(word in name for word in ("empty", "resize", "sum", "_to_copy", "clone"))


def _simulated(card: Any, step: Any, batch_size: int) -> Side:
    import memfit.api  # noqa: F401 - cuDNN finds a driver, as in every command
    from memfit.backends.simulated import SimulatedBackend
    from memfit.backends.traces import trace, trace_options
    from memfit.records import Action

    traced = trace(step, trace_options(card))
    trial = SimulatedBackend(card).trial(step, batch_size)
    names = {
        Action.ALLOC: "alloc",
        Action.TRY_ALLOC: "alloc",
        Action.ALLOC_IF_ROOM: "alloc",
        Action.FREE_COMPLETED: "free_completed",
    }
    events = [
        (
            names[event.action],
            event.id,
            event.num_bytes,
            CUDNN if event.origin == "convolution" else event.origin,
        )
        for event in traced.schedule.later.at(batch_size)
        if event.action in names
    ]
    return _side(events, trial)


def _side(events: Sequence[tuple[str, int, int, str]], trial: Any) -> Side:
    requests: list[Request] = []
    live: dict[int, Request] = {}
    held = most = 0
    at_peak: Counter[str] = Counter()
    for action, address, num_bytes, operator in events:
        if action == "alloc":
            request = Request(operator=operator, num_bytes=num_bytes)
            requests.append(request)
            live[address] = request
            held += num_bytes
            if held > most:
                most = held
                at_peak = Counter()
                peak_live = tuple(live.values())
        elif address in live:
            held -= live.pop(address).num_bytes
    for request in peak_live if most else ():
        at_peak[request.operator] += request.num_bytes
    return Side(
        requests=tuple(requests),
        at_peak=at_peak,
        requested_bytes=trial.peak_requested_bytes,
        allocated_bytes=trial.peak_allocated_bytes,
        reserved_bytes=trial.peak_reserved_bytes,
    )


# --- the comparison -----------------------------------------------------------------------------


def _print_header(card: str) -> None:
    import timm
    import torch

    print(
        f"{card}, simulated less rehearsed; {platform.machine()}, torch {torch.__version__}, "
        f"cuDNN {torch.backends.cudnn.version()}, timm {timm.__version__}, "
        f"{dt.datetime.now(tz=dt.timezone.utc):%Y-%m-%d}.\n"
    )
    print(
        "| model | setting | batch | requests | requested | allocated | reserved | rehearsed, MiB |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|")


def _row(name: str, setting: str, batch_size: int, real: Side, simulated: Side) -> str:
    cells = [
        f"{share:+.3%}"
        for share in (
            simulated.requested_bytes / real.requested_bytes - 1,
            simulated.allocated_bytes / real.allocated_bytes - 1,
            simulated.reserved_bytes / real.reserved_bytes - 1,
        )
    ]
    requests = f"{_num_differing(real, simulated)} of {len(real.requests)} differ"
    reserved = f"{real.reserved_bytes / 2**20:.0f}"
    return f"| {' | '.join([name, setting, str(batch_size), requests, *cells, reserved])} |"


def _num_differing(real: Side, simulated: Side) -> int:
    """Return how many requests only one of the sides makes, or both in another order."""
    theirs, ours = (list(map(_rounded, side.requests)) for side in (real, simulated))
    if theirs == ours:
        return 0
    in_one = (Counter(theirs) - Counter(ours)) + (Counter(ours) - Counter(theirs))
    in_order = sum(one != other for one, other in zip(theirs, ours, strict=False))
    return in_one.total() or in_order


def _print_differences(real: Side, simulated: Side) -> None:
    """Print each way in which requests differ, the one that makes up most bytes first."""
    found: Counter[tuple[str, str]] = Counter()
    num_bytes: Counter[tuple[str, str]] = Counter()
    theirs = [r for r in real.requests if r.operator != CUDNN]
    ours = [r for r in simulated.requests if r.operator != CUDNN]
    matcher = difflib.SequenceMatcher(
        None, [_rounded(r) for r in theirs], [_rounded(r) for r in ours], autojunk=False
    )
    for tag, start, stop, our_start, our_stop in matcher.get_opcodes():
        if tag == "equal":
            continue
        one, other = theirs[start:stop], ours[our_start:our_stop]
        key = (_named(one), _named(other))
        found[key] += 1
        num_bytes[key] += sum(r.num_bytes for r in one) + sum(r.num_bytes for r in other)
    for key, differing in num_bytes.most_common(40):
        print(f"  {found[key]} x, {differing} B: rehearsed {key[0]}")
        print(f"  {'':>{len(str(found[key]))}}    simulated {key[1]}")
    for side, name in ((real, "rehearsed"), (simulated, "simulated")):
        plans = [r.num_bytes for r in side.requests if r.operator == CUDNN]
        print(f"  {name}: {len(plans)} convolution workspaces, {sum(plans)} B in all")


def _rounded(request: Request) -> int:
    return -(-request.num_bytes // GRANULARITY_BYTES)


def _named(requests: Sequence[Request]) -> str:
    shown = ", ".join(f"{r.operator} {r.num_bytes}" for r in requests[:NUM_SHOWN])
    more = len(requests) - NUM_SHOWN
    return (shown or "nothing") + (f" and {more} more" if more > 0 else "")


def _print_distribution(rows: Sequence[tuple[Side, Side]]) -> None:
    if not rows:
        sys.exit("No step could be compared.")
    same = sum(not _num_differing(*row) for row in rows)
    print(f"\n{len(rows)} steps. In {same}, every request is the same, in the same order.")
    print("Peaks are off by, in absolute terms:")
    for what in ("requested_bytes", "allocated_bytes", "reserved_bytes"):
        off = sorted(abs(getattr(b, what) / getattr(a, what) - 1) for a, b in rows)
        print(
            f"  {what}: median {statistics.median(off):.3%}, 90% of steps "
            f"{off[int(0.9 * (len(off) - 1))]:.3%}, at worst {off[-1]:.3%}"
        )


if __name__ == "__main__":
    main()
