"""Tests of memfit.equivalence."""
