"""Releases memory, puts objects back as they were, and recognises out of memory."""
