"""Starts the watch. Every Python that a rehearsed command starts finds it first on `PYTHONPATH`.

It sets up the watch and removes its own folder from the import path. Then it runs the
`sitecustomize` that Python would have found without it.
"""

import importlib.machinery
import importlib.util
import os
import sys

_FOLDER = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib costs time in every Python


def _begin_watch() -> None:
    """Load the watch by its path, because this Python may not have memfit."""
    folder = os.path.dirname(_FOLDER)  # noqa: PTH120 - see above
    name = "_memfit_watch"
    spec = importlib.util.spec_from_file_location(
        name,
        os.path.join(folder, "__init__.py"),  # noqa: PTH118 - see above
        submodule_search_locations=[folder],
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    spec.loader.exec_module(package)
    importlib.import_module(f"{name}.start").begin()


def _hand_over() -> None:
    """Run the next `sitecustomize` on the import path, as if it were the first."""
    sys.path[:] = [entry for entry in sys.path if entry != _FOLDER]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize")
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if __name__ == "sitecustomize":
    if os.environ.get("MEMFIT_REHEARSAL_WATCH"):
        _begin_watch()
    _hand_over()
