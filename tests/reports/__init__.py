"""Tests of memfit.reports."""
