"""Rehearsal: runs PyTorch's own CUDA code on a card that is not there. Its kernels do nothing.

`device/` is the card, written in C. `build` compiles it, and `activate` loads it. A rehearsal needs
Linux and a CUDA build of torch. It needs no GPU. If the machine has a GPU, it is not used.
"""
