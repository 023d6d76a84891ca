"""Sweeps on a Ray cluster: what is lost with a node is done again."""

from __future__ import annotations

import time
import types
from collections.abc import Iterator
from typing import Any

import pytest

from memfit.errors import UnsupportedError
from memfit.records import SweepRow
from memfit.sweeping.cluster import RayPool, answers_of, check_versions
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


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes on this machine."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    import ray

    ray.shutdown()
    made.shutdown()


@pytest.mark.needs("ray")
# Four processes import torch and timm, which takes minutes on a loaded machine.
@pytest.mark.timeout(900)
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
