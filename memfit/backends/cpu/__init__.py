"""Trials on the CPU, under a real memory limit: Linux only, save for `machine`."""
