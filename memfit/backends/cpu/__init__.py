"""Trials on the CPU: real steps in child processes under a real memory limit."""

from __future__ import annotations

from memfit.backends.cpu.backend import CpuBackend

__all__ = ["CpuBackend"]
