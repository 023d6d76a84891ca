"""Every error that memfit raises of its own.

Out of memory is not here, because it is the outcome of a trial (`memfit.records.Outcome`). The
errors of a user's own model or loss are not here either. They are raised as they came.
`ToldToEnd` is no error, as Python's `KeyboardInterrupt` is none.

    MemfitError                     anything below; `exit_code` is what the command line ends with
    ├── UsageError (ValueError)     2  what was asked for cannot be: a name, a size, an option
    │   ├── UnknownModelError       2  no timm model of that name
    │   ├── UnknownDeviceError      2  no such device here
    │   └── WorkloadError           2  a model, batch, loss or optimizer that makes no training step
    │       └── DataEndedError  2  a function of the batch size has fewer samples
    ├── DoesNotFitError             3  not even the smallest batch fits
    ├── PeakGrewError               5  a peak is higher than the one that was kept
    ├── UnsupportedError            1  this system cannot run such a trial
    │   └── NotSimulatedError       1  a step that can be run, and not simulated
    ├── StepCrashedError            1  the training step took its process down
    └── RankFailedError             1  the same training step failed on another rank
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "DataEndedError",
    "DoesNotFitError",
    "MemfitError",
    "NotSimulatedError",
    "PeakGrewError",
    "RankFailedError",
    "StepCrashedError",
    "ToldToEnd",
    "UnknownDeviceError",
    "UnknownModelError",
    "UnsupportedError",
    "UsageError",
    "WorkloadError",
]


class MemfitError(Exception):
    """The base of every error of memfit's own."""

    exit_code: ClassVar[int] = 1


class UsageError(MemfitError, ValueError):
    """What was asked for cannot be: the message names the value and the nearest valid one."""

    exit_code: ClassVar[int] = 2


class UnknownModelError(UsageError):
    """No timm model has that name."""


class UnknownDeviceError(UsageError):
    """No such device on this machine."""


class WorkloadError(UsageError):
    """The model, batch, loss and optimizer do not make a training step."""


class DataEndedError(WorkloadError):
    """A function of the batch size returned fewer samples than it was asked for.

    Args:
        message: The sentence.
        num_samples: What it returned; `None` where it returned nothing.
    """

    def __init__(self, message: str, *, num_samples: int | None = None) -> None:
        super().__init__(message)
        self.num_samples = num_samples


class DoesNotFitError(MemfitError):
    """Not even the smallest batch size fits.

    Args:
        message: The sentence.
        needed_bytes: What the smallest batch size takes; `None` where that is not known, or is not
            what decides.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, needed_bytes: int | None = None) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class PeakGrewError(MemfitError):
    """The peak of a step is higher than the one that was kept, by more than the tolerance."""

    exit_code: ClassVar[int] = 5


class UnsupportedError(MemfitError):
    """This system cannot run such a trial."""


class NotSimulatedError(UnsupportedError):
    """The training step runs on a device, and its simulation would be wrong or cannot be had."""

    @classmethod
    def because(cls, subject: str, reason: str) -> NotSimulatedError:
        """Return the error with the way out in its sentence.

        Args:
            subject: What cannot be simulated, as a user calls it.
            reason: Why, as a clause.
        """
        return cls(
            f"{subject} cannot be simulated: {reason}. Rehearse it instead, which "
            "needs no GPU: give --engine rehearse, or run your script with memfit "
            "rehearse --gpu NAME -- python SCRIPT. Or measure on a device "
            "(--device)."
        )


class StepCrashedError(MemfitError):
    """The training step ended its process by a signal or an exit that memory did not cause."""


class RankFailedError(MemfitError):
    """The same training step failed on another rank; its own error is raised there."""


class ToldToEnd(KeyboardInterrupt):
    """SIGTERM or SIGHUP came for memfit while it ran a command, or between two runs of it."""

    exit_code: ClassVar[int] = 143
