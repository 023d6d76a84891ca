"""The folder that a rehearsed command finds first on `PYTHONPATH`; nothing else may be in it."""
