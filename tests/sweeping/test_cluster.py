"""Sweeps on a Ray cluster: what is lost with a node is done again."""

from __future__ import annotations

import contextlib
import socket
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest

from memfit.errors import UnsupportedError, UsageError
from memfit.records import SweepRow
from memfit.sweeping.cluster import RayPool, _check_reachable, answers_of, check_versions
from memfit.sweeping.tasks import SweepTask, versions

HERE = {"memfit": "1", "torch": "2.15.0", "timm": "1.0.31"}


def test_a_mixed_cluster_is_refused() -> None:
    """The message lists the nodes that differ, and their versions."""
    other = {**HERE, "torch": "2.14.1"}
    check_versions({"a": HERE, "b": dict(HERE)}, HERE)
    with pytest.raises(UnsupportedError) as caught:
        check_versions({"a": HERE, "b": other, "c": other}, HERE)
    message = str(caught.value)
    assert "2 of 3 nodes differ" in message
    assert "b: memfit 1, torch 2.14.1" in message
    assert "a:" not in message


class Answers:
    """Stands for Ray: each question is the answer, or the error that it ends with."""

    exceptions = types.SimpleNamespace(RayError=ConnectionError)

    @staticmethod
    def get(question: Any, *, timeout: float) -> Any:
        assert timeout >= 0
        if isinstance(question, Exception):
            raise question
        return question


def test_a_silent_node_is_listed() -> None:
    """A node that is too slow and a node that fails are told apart, and both are named."""
    asked = {"a": HERE, "b": TimeoutError(), "c": ConnectionError("trace\nNo module 'timm'")}
    with pytest.raises(UnsupportedError) as caught:
        answers_of(asked, Answers, seconds=900)
    message = str(caught.value)
    assert message.startswith("2 of 3 nodes of the Ray cluster could not say which versions")
    assert "  b: no answer in 900 s\n  c: No module 'timm'" in message
    assert answers_of({"a": HERE}, Answers, seconds=900) == {"a": HERE}


class Slow(SweepTask):
    """A step that takes a while, and says where it ran."""

    def run(self) -> tuple[SweepRow, ...]:
        time.sleep(0.2)
        (row,) = self.failed("slow")
        return (row,)


def _node_arguments() -> dict[str, Any]:
    """Return the arguments of a small node.

    A node whose agents choose their ports waits some seconds for them, and dies on a busy machine.
    """
    agents = ("metrics_agent_port", "runtime_env_agent_port", "dashboard_agent_listen_port")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in agents]
        for each in sockets:
            each.bind(("", 0))
        ports = [each.getsockname()[1] for each in sockets]
    return {"num_cpus": 1, "include_dashboard": False, **dict(zip(agents, ports, strict=True))}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patched:
        # Ray's workers are nice by 15. On a busy machine they then import torch for many minutes.
        patched.setenv("RAY_worker_niceness", "0")
        made = Cluster(initialize_head=True, head_node_args=_node_arguments())
        for _ in range(2):
            made.add_node(**_node_arguments())
        made.wait_for_nodes(timeout=120)
        yield made

    ray.shutdown()
    made.shutdown()


@pytest.mark.needs("ray")
@pytest.mark.filterwarnings("ignore")
def test_a_lost_node_loses_no_answer(cluster: Any) -> None:
    """A node is killed in the middle: every answer is there at the end, and none twice."""
    pool = RayPool(cluster.address, versions())
    tasks = [
        Slow(model="test_vit", gpus=("t4",), options={"precision": "fp32", "num_classes": number})
        for number in range(1, 19)
    ]
    answered = []
    for task, rows in pool.run(tasks):
        answered.append((task.key, rows[0].options.num_classes))
        if len(answered) == 4:
            cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
    assert sorted(answered) == sorted((task.key, task.options["num_classes"]) for task in tasks)


def test_an_address_without_a_cluster_is_one_sentence() -> None:
    """Ray itself would wait for minutes."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"no Ray cluster at '{address}'"):
            _check_reachable(address)
    _check_reachable("auto")
