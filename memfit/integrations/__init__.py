"""Thin bridges to other trainers."""
