"""The exception that a reader raised on a worker, raised again in the driver."""

from __future__ import annotations

import pickle
from typing import Any

from ray.exceptions import RayTaskError

from ray_resume.errors import ResumeError

__all__ = ["exception_of"]


def exception_of(cause: bytes, message: str, error: str) -> Exception:
    """Return what the driver raises for a source that could not be read.

    It is a ``RayTaskError`` and an instance of the exception's own class, as in plain Ray Data.

    Args:
        cause: the traceback and the exception, pickled (see `read.read_errors`).
        message: which source it was, and what to do.
        error: the text of the exception, for one that could not be pickled.
    """
    try:
        text, exception = pickle.loads(cause)
    except Exception:
        # The driver may not have the module that the class is from.
        return ResumeError(f"{message}\n{error}")
    task_error: Any = RayTaskError
    failed = task_error("ray_resume read", f"{message}\n\n{text}", exception)
    dual: Exception = failed.as_instanceof_cause()
    return dual
