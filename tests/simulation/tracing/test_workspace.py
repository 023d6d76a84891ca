"""Workspaces of convolutions where cuDNN is not asked."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from memfit.cards import find_gpu
from memfit.simulation.cudnn.needs import workspace_need
from memfit.simulation.tracing.convolution_calls import ConvolutionCall
from memfit.simulation.tracing.scripts import Workspace
from memfit.simulation.tracing.workspace import Kernels

FORWARD = torch.ops.aten.convolution.default
BACKWARD = torch.ops.aten.convolution_backward.default
CARDS = tuple(map(find_gpu, ("T4", "RTX 3060", "MI210")))


def workspaces(num_samples: int, case: dict[str, Any], kernels: Kernels) -> list[Workspace]:
    """Return the workspaces of a convolution's three kernels."""
    data = torch.empty(num_samples, case["channels"], case["side"], case["side"], device="meta")
    weight = torch.empty(64, case["channels"], case["filter"], case["filter"], device="meta")
    data, weight = (
        tensor.to(case["dtype"], memory_format=case["layout"]) for tensor in (data, weight)
    )
    rest = ([1, 1], [case["filter"] // 2] * 2, [1, 1], False, [0, 0], 1)
    output = FORWARD(data, weight, None, *rest)
    gradients = BACKWARD(output, data, weight, None, *rest, [True, True, False])
    scripts = (
        *kernels.script(FORWARD, (data, weight, None, *rest), output),
        *kernels.script(
            BACKWARD, (output, data, weight, None, *rest, [True, True, False]), gradients
        ),
    )
    return [line for line in scripts if isinstance(line, Workspace) and line.name == "convolution"]


CASES = [
    dict(zip(("dtype", "filter", "side", "channels", "layout"), case, strict=True))
    for case in itertools.product(
        (torch.bfloat16, torch.float32),
        (1, 3),
        (1, 7, 8),
        (3, 64),
        (torch.contiguous_format, torch.channels_last),
    )
]


@pytest.mark.parametrize("capability", [(6, 1), (7, 5), (8, 6)])
def test_a_need_is_left_out_only_if_it_is_nothing(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quick trace has the workspaces of the whole rule, at every batch size and on each card."""
    kernels = Kernels(compute_capability=capability, is_quick=True)
    rules: list[Any] = []
    question = ConvolutionCall.question

    def asked(call: ConvolutionCall) -> Any:
        found = question(call)
        assert found is not None
        half, tf32 = kernels._tensor_cores
        bound = call.data.element_size() if call.transposes(half=half, tf32=tf32) else 0
        rules.append(workspace_need(found, bound_bytes_per_element=bound, is_quick=True))
        return found

    monkeypatch.setattr(ConvolutionCall, "question", asked)
    num_left_out = 0
    for case, num_samples in itertools.product(CASES, (2, 37)):
        rules.clear()
        taken = workspaces(num_samples, case, kernels)
        assert len(taken) == len(rules) == 3
        for workspace, rule in zip(taken, rules, strict=True):
            assert workspace.tried is None
            whole = [rule.on(card) for card in CARDS]
            num_left_out += workspace.need is None
            if workspace.need is None:
                assert (workspace.num_bytes, whole) == (0, [0] * len(CARDS))
            else:
                assert [workspace.need.on(card) for card in CARDS] == whole
    assert 0 < num_left_out < 3 * 2 * len(CASES)
