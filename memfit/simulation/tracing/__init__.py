"""Traces a training step on meta tensors, and returns its allocations and frees as events."""
