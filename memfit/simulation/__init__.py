"""A training step without its device: traced on meta tensors, replayed on a model of the allocator."""
