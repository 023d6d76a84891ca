"""A pytest plugin: a test fails if a training step takes too much memory of a card.

    @pytest.mark.peak_memory("7.5GiB", gpu="t4")
    def test_a_step():
        model = Net().to("cuda")
        ...

The test runs in a process of its own, on the card, which is rehearsed. No GPU is needed, and the
figure is the same every time. Its fixtures are set up in both processes. A test that uses the
fixture `peak_memory` runs here instead, and simulates the steps that it asks about. Each peak is
compared with the peak of the same test in `memfit-baseline.json` (the option `memfit_baseline`), if
there is one. `--memfit-update` writes the peaks of a run into that file.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from memfit.profiling.baselines import Baselines
    from memfit.records import MemoryProfile, Peak, Source

__all__ = ["PeakMemory"]

_MARKER = "peak_memory"
_FIXTURE = "peak_memory"
_FILE = "memfit-baseline.json"
_TOLERANCE = 0.01


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("memfit")
    group.addoption(
        "--memfit-update", action="store_true", help="Keep this run's peaks as the baseline."
    )
    parser.addini(
        "memfit_baseline", f"The file that keeps the peaks, by default {_FILE}.", default=_FILE
    )


def pytest_configure(config: pytest.Config) -> None:
    """Name the marker."""
    config.addinivalue_line(
        "markers",
        "peak_memory(limit=None, *, gpu, tolerance=0.01): fail if the test's training step takes "
        "more than `limit` of the card's memory, or more than the peak that was kept before.",
    )


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The arguments of the marker."""

    limit_bytes: int | None
    gpu: str
    tolerance: float

    @classmethod
    def of(cls, marker: pytest.Mark) -> _Asked:
        return cls._of(*marker.args, **marker.kwargs)

    @classmethod
    def _of(
        cls,
        limit: str | float | None = None,
        *,
        gpu: str | None = None,
        tolerance: float = _TOLERANCE,
    ) -> _Asked:
        from memfit.cards import find_gpu
        from memfit.errors import UsageError
        from memfit.units import parse_bytes

        if gpu is None:
            raise UsageError("peak_memory needs a card: write peak_memory('7.5GiB', gpu='t4').")
        find_gpu(gpu)
        return cls(
            limit_bytes=None if limit is None else parse_bytes(limit),
            gpu=gpu,
            tolerance=tolerance,
        )


class PeakMemory:
    """What the fixture `peak_memory` gives: the peaks of training steps on the marker's card.

    Args:
        item: The test.
    """

    def __init__(self, item: pytest.Item) -> None:
        self._item = item
        self._num_asked = 0

    def __call__(self, subject: Any, batch_size: int, **options: Any) -> MemoryProfile:
        """Profile a step, and fail if its peak is over the limit or has grown.

        Args:
            subject: A timm model's name, or a `memfit.Workload`.
            batch_size: Samples in each micro-batch.
            **options: As in `memfit.profile`. By default, the engine is `"simulate"`, and there is
                no advice.

        Returns:
            The profile; its `peak.total_bytes` is the figure.
        """
        import memfit

        asked = _marker_of(self._item)
        self._num_asked += 1
        given = {
            "gpu": asked.gpu,
            "engine": "simulate",
            "advice": False,
            "progress": None,
            **options,
        }
        found = memfit.profile(subject, batch_size, **given)
        name = self._item.nodeid + (f" #{self._num_asked}" if self._num_asked > 1 else "")
        _check(
            self._item,
            asked,
            _Seen(
                name=name,
                peak=found.peak,
                source=found.source,
                torch_version=found.torch_version,
                device=found.device,
            ),
        )
        return found


@pytest.fixture
def peak_memory(request: pytest.FixtureRequest) -> PeakMemory:
    """Give the peaks of training steps on the card of the test's marker `peak_memory`."""
    return PeakMemory(request.node)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object | None:
    """Run a marked test on its card, which is rehearsed, in a process of its own."""
    is_marked = pyfuncitem.get_closest_marker(_MARKER) is not None
    if not is_marked or _FIXTURE in pyfuncitem.fixturenames or _is_inside():
        return None
    _rehearse(pyfuncitem)
    # The body has run in the other process, so pytest does not run it again.
    return True


def _is_inside() -> bool:
    from memfit.cards import is_rehearsed

    return is_rehearsed()


def _marker_of(item: pytest.Item) -> _Asked:
    from memfit.errors import UsageError

    marker = item.get_closest_marker(_MARKER)
    if marker is None:
        pytest.fail(
            "The fixture peak_memory needs the marker: @pytest.mark.peak_memory(gpu='t4').",
            False,
        )
    try:
        return _Asked.of(marker)
    except (UsageError, TypeError) as error:
        raise _failure(str(error).replace("_Asked._of()", "peak_memory")) from None


def _failure(message: str) -> BaseException:
    """Return what fails a test with a sentence, and without the errors that led to it."""
    return pytest.fail.Exception(message, pytrace=False)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A peak, and where it comes from."""

    name: str
    peak: Peak
    source: Source
    torch_version: str
    device: str


def _rehearse(item: pytest.Function) -> None:
    """Run the test on its card, and check the peak."""
    from memfit.cards import find_gpu
    from memfit.errors import UnsupportedError, UsageError
    from memfit.profiling.rehearsed import recorded_step
    from memfit.rehearsal.activate import rehearsed_environment
    from memfit.rehearsal.children import Output
    from memfit.rehearsal.run import rehearse_command

    asked = _marker_of(item)
    card = find_gpu(asked.gpu)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
    command += ["--rootdir", str(item.config.rootpath), item.nodeid]
    before = Path.cwd()
    try:
        os.chdir(item.config.rootpath)
        found = rehearse_command(
            command,
            card,
            rehearsed_environment(card, environment=os.environ),
            is_whole=True,
            keeps_history=True,
            output=Output.KEPT,
        )
        if found.rehearsal.exit_code:
            pytest.fail(
                f"On a rehearsed {card.name} the test failed:\n{found.last_words}", pytrace=False
            )
        step = recorded_step(found)
    except (UsageError, UnsupportedError) as error:
        raise _failure(f"{error} The test has to train on 'cuda'.") from None
    finally:
        os.chdir(before)
    process = found.process
    assert process is not None
    _check(
        item,
        asked,
        _Seen(
            name=item.nodeid,
            peak=step.peak,
            source=found.rehearsal.source,
            torch_version=process.torch_version,
            device=card.name,
        ),
    )


def _baselines(config: pytest.Config) -> Baselines:
    from memfit.profiling.baselines import Baselines

    return Baselines(config.rootpath / str(config.getini("memfit_baseline")))


def _check(item: pytest.Item, asked: _Asked, seen: _Seen) -> None:
    """Fail the test if a peak is over the limit, or has grown."""
    from memfit.errors import UsageError
    from memfit.profiling.baselines import growth_words
    from memfit.units import format_bytes

    source, version = seen.source, seen.torch_version
    try:
        kept = _baselines(item.config)
        if item.config.getoption("--memfit-update"):
            kept.keep(seen.name, seen.peak, source=source, torch_version=version)
    except UsageError as error:
        raise _failure(str(error)) from None
    said = []
    if asked.limit_bytes is not None and seen.peak.total_bytes > asked.limit_bytes:
        said.append(
            f"The step takes {format_bytes(seen.peak.total_bytes)} on {seen.device} "
            f"({seen.source.value}), {format_bytes(seen.peak.context_bytes)} of it for the CUDA "
            f"context. The limit is {format_bytes(asked.limit_bytes)}."
        )
    if seen.name in kept:
        growth = kept.compare(
            seen.name, seen.peak, tolerance=asked.tolerance, source=source, torch_version=version
        )
        if growth.has_grown or (said and growth.shares):
            said.append(growth_words(growth))
    if said:
        pytest.fail("\n".join(said), pytrace=False)
