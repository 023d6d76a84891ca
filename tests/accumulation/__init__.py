"""Tests of memfit.accumulation."""
