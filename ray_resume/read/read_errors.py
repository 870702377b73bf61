"""Exceptions of readers: which are transient, and how workers report the others.

A worker reports an exception to the ledger with the source that it belongs to, and goes on with
its other sources. The driver raises the exception at the end of the run (`run.reader_exception`).
"""

from __future__ import annotations

import pickle
import traceback

from ray import cloudpickle
from ray.data import DataContext
from ray.exceptions import RayError, RayTaskError

from ray_resume.core.error_text import text_of
from ray_resume.core.messages import ReadFailure
from ray_resume.errors import ResumeError
from ray_resume.raydata.retries import matches

__all__ = ["RowsMovedError", "is_rays_own", "is_transient", "read_failure"]

# Longer tracebacks are cut, larger exceptions are reported by their text alone.
_MAX_TRACEBACK_CHARS = 20_000
_MAX_CAUSE_BYTES = 64 << 10


class RowsMovedError(ResumeError):
    """The rows of a source are in other files now. They are the same, and the source is intact."""


def read_failure(source: int, total: int, rows: int, error: Exception) -> ReadFailure:
    """Describe that the reader of a source raised ``error`` after ``rows`` rows.

    Args:
        source: the number of the source in the run's table.
        total: the sum of the tokens of those rows, modulo 2**64.
    """
    return ReadFailure(source, total, rows, _words(error), _pickled(error), is_transient(error))


def is_rays_own(error: BaseException) -> bool:
    """Say whether Ray failed while a reader ran (a lost object, say): it knows what to do then."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def is_transient(error: BaseException) -> bool:
    """Say whether ``error`` is about the storage at this time, not about the source.

    These are lost connections, timeouts, and the errors that match
    ``DataContext.retried_io_errors``, which Ray Data has retried for some time before it raises.
    """
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return matches(DataContext.get_current().retried_io_errors, error)


def _words(error: Exception) -> str:
    """Return the text of an exception, and of the one that it was raised from."""
    text = text_of(error)
    # Ray Data forgets the cause (``from None``) when it has tried a read for the last time.
    cause = error.__cause__ or error.__context__
    if cause is None or str(cause) in text:
        return text
    return f"{text}; caused by {text_of(cause)}"


def _pickled(error: Exception) -> bytes:
    text = "".join(traceback.format_exception(error))[-_MAX_TRACEBACK_CHARS:]
    try:
        cause: bytes = cloudpickle.dumps((text, error))  # type: ignore[no-untyped-call]
        # Some exceptions can be pickled and not unpickled.
        pickle.loads(cause)
    except Exception:
        # Whatever an exception holds, its text is reported.
        return b""
    return cause if len(cause) <= _MAX_CAUSE_BYTES else b""
