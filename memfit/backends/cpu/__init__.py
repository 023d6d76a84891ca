"""Trials on the CPU, under a real memory limit. All modules but `machine` need Linux."""
