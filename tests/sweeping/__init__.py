"""Tests of sweeps and choices."""
