"""The exception that a reader raised on a worker, raised again in the driver."""

from __future__ import annotations

import pickle
from typing import Any

from ray.exceptions import RayTaskError

from ray_resume.errors import ResumeError
from ray_resume.run.progress import Unread

__all__ = ["error_of_unread", "exception_of"]


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


def error_of_unread(unread: Unread, total: int, max_failed_runs: int) -> Exception:
    """Return what a run raises for the sources that could not be read, of ``total``."""
    message = (
        f"{unread.count} of {total} sources could not be read. The first is "
        f"{unread.source_id}: {unread.error}\nThe run went on with the other sources, and what "
        "is complete is committed. The next run reads these sources again. Sources that failed "
        f"in {max_failed_runs} runs are quarantined and skipped. Repair or remove "
        "them, or set ray.data.DataContext.get_current().max_errored_blocks to the number of "
        "sources that may fail in a run (-1: any number)."
    )
    return exception_of(unread.cause, message, unread.error)
