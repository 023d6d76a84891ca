"""Finished records, made into what people look at. Nothing here measures or decides."""
