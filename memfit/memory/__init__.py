"""Memory given back, objects put back, and out of memory recognised."""
