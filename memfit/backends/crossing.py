"""Sends errors from a child process to its parent."""

from __future__ import annotations

import pickle

from memfit.errors import StepCrashedError

__all__ = ["ChildTraceback", "portable"]


class ChildTraceback(Exception):  # noqa: N818 - the cause of an error, not one itself
    """The traceback of an error in the child, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def portable(error: BaseException) -> BaseException:
    """Return the error in a form that can be sent to the parent."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:  # noqa: BLE001 - a user's exception may fail to pickle in any way
        return StepCrashedError(f"The training step raised {type(error).__name__}: {error}")
    return error
