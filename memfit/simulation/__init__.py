"""A training step without its device: traced on meta tensors, replayed on an allocator's model."""
