"""Imports that a cancelled task cannot leave half made.

Ray cancels a task by a ``KeyboardInterrupt`` in the worker's main thread. In the middle of an
import, that leaves modules behind which refer to one that Python has taken back: ``lance.types``
keeps a ``lance.dataset`` without names. Each later task of that worker then fails.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
from typing import Any

__all__ = ["import_library_of", "import_whole"]

# The libraries that datasinks import when they write, by the modules of the datasinks.
_LIBRARIES = {
    "ray.data._internal.datasource.lance_datasink": ("lance",),
    "lance_ray.datasink": ("lance",),
    "ray.data._internal.datasource.iceberg_datasink": ("pyiceberg.table", "pyiceberg.io.pyarrow"),
    "ray.data._internal.datasource.delta_datasink": ("deltalake",),
}


def import_library_of(datasink: Any) -> None:
    """Import what a datasink of a table needs to write."""
    for base in type(datasink).__mro__:
        import_whole(*_LIBRARIES.get(base.__module__, ()))


def import_whole(*modules: str) -> None:
    """Import modules in a thread that no interrupt reaches; one that is missing is left out.

    If this thread is interrupted meanwhile, the other one goes on to the end of the import.
    """
    if not modules:
        return
    thread = threading.Thread(target=_import, args=modules)
    thread.start()
    thread.join()


def _import(*modules: str) -> None:
    for module in modules:
        # The code that needs the module raises an error of its own.
        with contextlib.suppress(Exception):
            importlib.import_module(module)
