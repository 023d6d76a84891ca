"""The largest batch size that fits, measured and proved."""

__version__ = "0.1.0"
