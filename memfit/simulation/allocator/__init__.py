"""A model of PyTorch's CUDA caching allocator. It does not use torch."""
