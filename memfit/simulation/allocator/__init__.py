"""A model of PyTorch's CUDA caching allocator. It knows no torch."""
