"""The folder that is first on a rehearsed command's `PYTHONPATH`. Put no other file into it."""
