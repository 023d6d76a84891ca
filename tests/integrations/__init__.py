"""Tests of what trainers are given, with the trainers themselves."""
