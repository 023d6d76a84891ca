"""Runs the tasks on a Ray cluster. If a node is lost, its tasks run again on another."""

from __future__ import annotations

import importlib
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from memfit.errors import UnsupportedError, UsageError
from memfit.sweeping.workers import Task

__all__ = ["RayPool", "answers_of", "check_versions"]

_RETRIES = 5
# How long a node may take to start a process and import torch and timm. A loaded machine needs
# minutes.
_NODE_SECONDS = 900
_SECONDS_TO_ANSWER = 10
# How many tasks the cluster has at a time, for each of its cores.
_TASKS_EACH = 4


class RayPool:
    """A Ray cluster that runs tasks.

    A task whose worker or node is lost runs again somewhere else. Each task is answered once.

    Args:
        address: `"auto"` for the cluster that this machine belongs to, or its address.
        versions: The versions of this process; every node must have the same.

    Raises:
        UnsupportedError: Ray is not installed, or nodes have other versions.
        UsageError: There is no cluster at the address.
    """

    def __init__(self, address: str, versions: Mapping[str, str]) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise UnsupportedError(
                "Sweeps on a cluster need Ray, which is not installed: pip install 'memfit[sweep]'."
            ) from error
        if not self._ray.is_initialized():
            _check_reachable(address)
            try:
                self._ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UsageError(
                    f"There is no Ray cluster at {address!r}: {str(error).partition(chr(10))[0]} "
                    "Start one with `ray start --head`."
                ) from error
        check_versions(self._versions_by_node(), versions)

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Any, Any]]:
        """Run tasks, and yield each with its answer as soon as it is known.

        Args:
            tasks: The tasks. They can be pickled.
        """
        ray = self._ray
        remote = ray.remote(num_cpus=1, max_retries=_RETRIES, retry_exceptions=False)(_run)
        waiting = list(reversed(tasks))
        running: dict[Any, Task] = {}
        try:
            while waiting or running:
                room = _TASKS_EACH * max(1, int(ray.cluster_resources().get("CPU", 1)))
                while waiting and len(running) < room:
                    task = waiting.pop()
                    running[remote.remote(task)] = task
                done, _ = ray.wait(list(running), num_returns=1)
                for reference in done:
                    task = running.pop(reference)
                    try:
                        answer = ray.get(reference)
                    except ray.exceptions.RayError as error:
                        answer = task.failed(
                            f"The cluster lost the task {_RETRIES + 1} times: "
                            f"{str(error).strip().partition(chr(10))[0]}"
                        )
                    yield task, answer
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def _versions_by_node(self) -> dict[str, dict[str, str]]:
        """Ask every node which versions it has."""
        ray = self._ray
        pinned = importlib.import_module("ray.util.scheduling_strategies")
        asked = {}
        for node in ray.nodes():
            if node["Alive"] and node["Resources"].get("CPU"):
                strategy = pinned.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                where = f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"
                ask = ray.remote(num_cpus=1, scheduling_strategy=strategy)(_versions)
                asked[where] = ask.remote()
        if not asked:
            raise UnsupportedError("The Ray cluster has no node with a CPU to run tasks on.")
        return answers_of(asked, ray, seconds=_NODE_SECONDS)


def _check_reachable(address: str) -> None:
    """Refuse an address where nothing answers. Ray would wait for it for minutes.

    Raises:
        UsageError: Nothing answers at the address's port.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"There is no Ray cluster at {address!r}: {error}. Start one with `ray start --head`."
        ) from error


def answers_of(asked: Mapping[str, Any], ray: Any, *, seconds: float) -> dict[str, dict[str, str]]:
    """Return what all nodes answer.

    Args:
        asked: The question that each node was asked, by node.
        ray: Ray.
        seconds: How long all nodes together may take.

    Raises:
        UnsupportedError: A node did not answer in time, or could not; the message lists such nodes.
    """
    found: dict[str, dict[str, str]] = {}
    silent: dict[str, str] = {}
    end = time.monotonic() + seconds
    for where, question in asked.items():
        try:
            found[where] = ray.get(question, timeout=max(0, end - time.monotonic()))
        except TimeoutError:  # noqa: PERF203 - every node is asked
            silent[where] = f"no answer in {seconds:.0f} s"
        except ray.exceptions.RayError as error:
            silent[where] = str(error).strip().rpartition("\n")[2]
    if silent:
        lines = [f"  {where}: {why}" for where, why in sorted(silent.items())]
        raise UnsupportedError(
            f"{len(silent)} of {len(asked)} nodes of the Ray cluster could not say which versions "
            "of memfit, torch and timm they have. Each needs all three, as here:\n"
            + "\n".join(lines)
        )
    return found


def check_versions(found: Mapping[str, Mapping[str, str]], here: Mapping[str, str]) -> None:
    """Refuse a cluster whose nodes have other versions than this process.

    Args:
        found: The versions by package, by node.
        here: The versions of this process.

    Raises:
        UnsupportedError: A node has another version; the message lists every such node.
    """
    other = {node: each for node, each in found.items() if dict(each) != dict(here)}
    if other:
        lines = [f"  {node}: {_listed(each)}" for node, each in sorted(other.items())]
        raise UnsupportedError(
            "The figures of a sweep depend on the versions, so all nodes need the same. Here: "
            f"{_listed(here)}. {len(other)} of {len(found)} nodes differ:\n" + "\n".join(lines)
        )


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in versions.items())


def _run(task: Task) -> Any:
    import torch

    torch.set_num_threads(1)
    return task.run()


def _versions() -> dict[str, str]:
    from memfit.sweeping.tasks import versions

    return versions()
