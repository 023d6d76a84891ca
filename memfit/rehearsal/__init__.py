"""Rehearsal: PyTorch's own CUDA software on a card that is not there, with kernels that do nothing.

`device/` is the card, in C. `build` compiles it, `activate` loads it. What a rehearsal needs is
Linux and a CUDA build of torch. No GPU is needed, and one that is there is not touched.
"""
