"""Ranks that do not meet: collectives of objects, and the store of a rank that is alone.

Each rank rehearses its own card as if every rank held the same (`nccl.c`). Collectives of objects
read sizes from tensors that a kernel has computed, so here they are done without the card. A rank
that is alone, without a process for any other, gets a store that never waits.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .internals import Distributed

__all__ = ["replace_object_collectives", "stay_alone"]

_UNIQUE_ID_BYTES = 128


def replace_object_collectives(c10d: ModuleType) -> None:
    """Do collectives of objects as if every rank held this rank's objects, where NCCL does them.

    Args:
        c10d: The module `torch.distributed.distributed_c10d`.
    """
    distributed = Distributed(c10d)

    def replace(name: str, own: Callable[[dict[str, Any], int, int], None]) -> None:
        original = getattr(c10d, name, None)
        if original is None:
            return
        signature = inspect.signature(original)

        @functools.wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            group = given.get("group")
            if c10d.get_rank(group) < 0 or not distributed.is_on_card(group):
                return original(*args, **kwargs)
            own(given, c10d.get_rank(group), c10d.get_world_size(group))
            return None

        for module in (c10d, sys.modules.get("torch.distributed")):
            if module is not None and hasattr(module, name):
                setattr(module, name, collective)

    replace("all_gather_object", _all_gather)
    replace("gather_object", _gather)
    replace("scatter_object_list", _scatter)
    # Every rank has the objects already.
    replace("broadcast_object_list", lambda _given, _rank, _size: None)


def _all_gather(given: dict[str, Any], _rank: int, size: int) -> None:
    given["object_list"][:size] = [copy.deepcopy(given["obj"]) for _ in range(size)]


def _gather(given: dict[str, Any], _rank: int, size: int) -> None:
    gathered = given.get("object_gather_list")
    if gathered is not None:
        gathered[:size] = [copy.deepcopy(given["obj"]) for _ in range(size)]


def _scatter(given: dict[str, Any], rank: int, _size: int) -> None:
    objects = given.get("scatter_object_input_list")
    if objects:
        given["scatter_object_output_list"][0] = copy.deepcopy(objects[rank])


def stay_alone(c10d: ModuleType, *, rank: int, world_size: int) -> None:
    """Let a process group begin with this rank alone, also with a store that the script makes.

    Args:
        c10d: The module `torch.distributed.distributed_c10d`.
        rank: This rank.
        world_size: The number of ranks.
    """
    lone_store = type("LoneStore", (_LoneStore, c10d.Store), {})
    for module in (c10d, sys.modules.get("torch.distributed")):
        for name in ("TCPStore", "FileStore"):
            if hasattr(module, name):
                setattr(module, name, lone_store)
    store = lone_store()

    def rendezvous(_url: str, **_options: Any) -> Any:
        yield store, rank, world_size

    Distributed(c10d).replace_rendezvous(rendezvous)


class _LoneStore:
    """The methods of a store in this process. What another rank would have set is zeros.

    Args:
        host_name: The host of a `TCPStore`, or the file of a `FileStore`. Nothing is asked there.
        port: The port of a `TCPStore`.
        _options: What else a real store takes.
    """

    def __init__(self, host_name: str = "", port: int = 0, *_options: Any, **_named: Any) -> None:
        super().__init__()
        self.host = host_name
        self.port = port
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: str | bytes) -> None:
        self._values[key] = _as_bytes(value)

    def get(self, key: str) -> bytes:
        return self._values.get(key, bytes(_UNIQUE_ID_BYTES))

    def add(self, key: str, value: int) -> int:
        with self._lock:
            total = int(self._values.get(key, b"0")) + value
            self._values[key] = str(total).encode()
        return total

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        with self._lock:
            if self._values.get(key, b"") == _as_bytes(expected):
                self._values[key] = _as_bytes(desired)
            return self._values.get(key, _as_bytes(expected))

    def delete_key(self, key: str) -> bool:
        return self._values.pop(key, None) is not None

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        pass

    def num_keys(self) -> int:
        return len(self._values)

    def set_timeout(self, timeout: Any) -> None:
        pass


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
