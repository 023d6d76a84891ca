"""Simulates a training step: traces it on meta tensors, replays it on a model of the allocator."""
