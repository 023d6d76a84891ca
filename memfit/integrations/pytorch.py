"""A plan as plain PyTorch: a loop with `memfit.Accumulator`, and one written by hand."""

from __future__ import annotations

from memfit.integrations.equal import comment
from memfit.integrations.step_lines import are_images_channels_last, brought, model_lines
from memfit.records import Plan, Precision
from memfit.units import format_parts

__all__ = ["lines"]

_AUTOCAST = {Precision.AMP_BF16: "bfloat16", Precision.AMP_FP16: "float16"}


def lines(plan: Plan) -> str:
    """Return two loops over a loader of effective batches; either carries the plan out.

    They expect `model`, `optimizer`, `loss_fn` and `dataset`.
    """
    loader = _loader_of_ranks(plan) if plan.ranks else _loader(plan)
    return "\n\n".join((loader, _accumulator(plan), _by_hand(plan))) + "\n"


def _loader(plan: Plan) -> str:
    parts = format_parts(plan.micro_batch_sizes)
    share = plan.share_of(0)
    if plan.world_size == 1:
        return (
            comment(
                f"{plan.effective_batch_size} = {parts}, {plan.source.value} for {plan.device} in "
                f"{plan.options.precision.value}.",
                *brought(plan),
            )
            + "\nimport torch\nfrom torch.utils.data import DataLoader\n\n"
            + _model(plan)
            + f"loader = DataLoader(dataset, batch_size={share}, shuffle=True)"
        )
    rest = plan.effective_batch_size % plan.world_size
    uneven = (
        (
            f"The first {rest} of {plan.world_size} ranks take {share} samples of "
            f"each step and the others {share - 1}. A DistributedSampler gives each "
            "rank the same number, so write your own sampler."
        ),
    ) * bool(rest)
    size = f"{share} - (distributed.get_rank() >= {rest})" if rest else str(share)
    return (
        comment(
            f"{plan.effective_batch_size} over {plan.world_size} ranks: {parts} on the first, "
            f"{plan.source.value} for {plan.device} in {plan.options.precision.value}. The model "
            "is a DistributedDataParallel.",
            *brought(plan, model="model.module"),
            *uneven,
        )
        + "\nimport torch\nfrom torch import distributed\n"
        + "from torch.utils.data import DataLoader, DistributedSampler\n\n"
        + _model(plan)
        + "sampler = DistributedSampler(dataset, shuffle=True)\n"
        + f"loader = DataLoader(dataset, batch_size={size}, sampler=sampler)"
    )


def _loader_of_ranks(plan: Plan) -> str:
    """Return a loader that gives each rank its own share of every effective batch."""
    shares = tuple(part.share for part in plan.ranks)
    sizes = tuple(part.micro_batch_sizes[0] for part in plan.ranks)
    parts = "; ".join(
        f"rank {rank} on {part.device}: {format_parts(part.micro_batch_sizes)}"
        for rank, part in enumerate(plan.ranks)
    )
    samples = plan.effective_batch_size
    return (
        comment(
            f"{samples} over {plan.world_size} ranks, {plan.source.value} in "
            f"{plan.options.precision.value}. {parts}. The model is a DistributedDataParallel.",
            *brought(plan, model="model.module"),
        )
        + "\nimport torch\nfrom torch import distributed\n"
        + "from torch.utils.data import DataLoader\n\n"
        + _model(plan)
        + f"shares, sizes = {shares}, {sizes}\n"
        + "rank = distributed.get_rank()\n\n\n"
        + "def batches(epoch):  # the same order on all ranks; of each batch this rank's share\n"
        + "    generator = torch.Generator().manual_seed(epoch)\n"
        + "    order = torch.randperm(len(dataset), generator=generator).tolist()\n"
        + "    start = sum(shares[:rank])\n"
        + f"    for first in range(0, len(order) - {samples} + 1, {samples}):\n"
        + "        yield order[first + start : first + start + shares[rank]]\n\n\n"
        + "loader = DataLoader(dataset, batch_sampler=list(batches(epoch=0)))"
    )


def _model(plan: Plan) -> str:
    return "".join(f"{line}\n" for line in model_lines(plan))


def _accumulator(plan: Plan) -> str:
    size = "sizes[rank]" if plan.ranks else str(plan.micro_batch_size)
    arguments = ["model", "optimizer", size, "loss=loss_fn"]
    if plan.multiple_of > 1:
        arguments.append(f"multiple_of={plan.multiple_of}")
    if plan.options.precision is not Precision.FP32:
        arguments.append(f'precision="{plan.options.precision.value}"')
    return (
        comment("With memfit, a step that runs out of memory is done again in smaller parts.")
        + "\nimport memfit\n\n"
        + f"accumulator = memfit.Accumulator({', '.join(arguments)})\n"
        + (
            "for x, y in loader:\n"
            "    loss = accumulator.step((x.to(memory_format=torch.channels_last), y))"
            if are_images_channels_last(plan)
            else "for batch in loader:\n    loss = accumulator.step(batch)"
        )
    )


def _by_hand(plan: Plan) -> str:
    """Return the loop that a user would write without `Accumulator`."""
    precision, num_ranks = plan.options.precision, plan.world_size
    is_scaled, has_ranks = precision is Precision.AMP_FP16, num_ranks > 1
    setup = ["device = next(model.parameters()).device"]
    if is_scaled:
        setup.append("scaler = torch.amp.GradScaler(device.type)")
    step = ["scaler.step(optimizer)", "scaler.update()"] if is_scaled else ["optimizer.step()"]
    count = ["total = torch.tensor(len(x), device=device)", "distributed.all_reduce(total)"]
    for_each_part = [
        *(count if has_ranks else ["total = len(x)"]),
        *_parts(plan),
        "for index, (x_i, y_i) in enumerate(parts):" if has_ranks else "for x_i, y_i in parts:",
        *_indented(_one_part(plan)),
        *step,
        "optimizer.zero_grad(set_to_none=True)",
    ]
    imports = ["import contextlib\n"] * has_ranks
    return "\n".join(
        [
            comment("Or by hand, for a loss that is a mean over samples."),
            *imports,
            *setup,
            "for x, y in loader:",
            *_indented(for_each_part),
        ]
    )


def _parts(plan: Plan) -> list[str]:
    """Return lines that cut a batch as in the plan; a short last batch is cut the same way."""
    if plan.ranks:
        return [
            "num_parts = -(-len(x) // sizes[rank])",
            "parts = list(zip(x.tensor_split(num_parts), y.tensor_split(num_parts)))",
        ]
    size, share = plan.micro_batch_size, plan.share_of(0)
    by_size = [size] * (share // size) + [share % size] * (share % size > 0)
    if tuple(by_size) == plan.micro_batch_sizes:
        return [f"parts = list(zip(x.split({size}), y.split({size})))"]
    return [
        f"num_parts = -(-len(x) // {size})",
        "parts = list(zip(x.tensor_split(num_parts), y.tensor_split(num_parts)))",
    ]


def _one_part(plan: Plan) -> list[str]:
    """Return lines for forward and backward of one micro-batch."""
    precision, num_ranks = plan.options.precision, plan.world_size
    dtype = _AUTOCAST.get(precision)
    how = ["device"]
    if precision is Precision.BF16:
        how.append("torch.bfloat16")
    if are_images_channels_last(plan):
        how.append("memory_format=torch.channels_last")
    place = f"x_i.to({', '.join(how)})"
    # DistributedDataParallel averages gradients over the ranks; they have to be summed.
    averaged = f" * {num_ranks}" if num_ranks > 1 else ""
    passes = ["loss = loss_fn(model(x_i), y_i) * weight"]
    if dtype is not None:
        passes = [f"with torch.autocast(device.type, dtype=torch.{dtype}):", *_indented(passes)]
    is_scaled = precision is Precision.AMP_FP16
    passes.append("scaler.scale(loss).backward()" if is_scaled else "loss.backward()")
    if num_ranks > 1:
        is_last = "index == len(parts) - 1"
        passes = [
            f"with contextlib.nullcontext() if {is_last} else model.no_sync():",
            *_indented(passes),
        ]
    return [
        f"x_i, y_i = {place}, y_i.to(device)",
        f"weight = len(x_i) / total{averaged}",
        *passes,
    ]


def _indented(lines_of_code: list[str]) -> list[str]:
    return [f"    {line}" for line in lines_of_code]
