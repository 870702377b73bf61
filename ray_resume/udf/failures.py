"""Which rows of a UDF call have failed, and why: collected while the call runs.

:func:`mark_failed` is what users call. It finds the call that it was made in by a context variable,
since a UDF has no other way to know it. `stage` and `row_udfs` enter the :class:`Scope` of a call
around each step of the user's code.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from ray_resume.core.error_text import text_of
from ray_resume.errors import ResumeError
from ray_resume.raydata.pool_actors import EXITS, die_as_if_killed

__all__ = [
    "Failures",
    "Raised",
    "Scope",
    "current_scope",
    "mark_failed",
]


@dataclass(frozen=True)
class Raised:
    """The error that a step of a UDF ended with, in the place of an output."""

    error: Exception


class Failures:
    """The failed rows among the ``rows`` input rows of one call.

    ``mask`` is ``bool``, shape ``(rows,)``.
    """

    __slots__ = ("_texts", "_which", "mask")

    def __init__(self, rows: int) -> None:
        self.mask: npt.NDArray[np.bool_] = np.zeros(rows, dtype=bool)
        self._which = np.zeros(rows, dtype=np.int32)
        self._texts: list[str] = []

    def __bool__(self) -> bool:
        return bool(self._texts) and bool(self.mask.any())

    def mark(self, error: object, rows: Any = None) -> None:
        """Mark ``rows`` (a boolean mask, or positions; None: all) as failed with ``error``.

        A row that was marked before keeps its first error.

        Raises:
            ValueError: ``rows`` are not rows of the call.
        """
        chosen = _mask(rows, len(self.mask)) & ~self.mask
        self.mask |= chosen
        self._which[chosen] = len(self._texts)
        self._texts.append(text_of(error))

    def texts(self, positions: npt.NDArray[np.intp]) -> list[str]:
        """Return the error of each of these rows, all of them marked."""
        return [self._texts[which] for which in self._which[positions]]


class Scope:
    """One step of the user's code in a call, and in a row-wise UDF the ``row`` that it sees.

    It is entered as a context, and is then the scope of what that thread or coroutine runs. The
    step sets ``result``. If the scope is ``tolerant``, an `Exception` that the step raises becomes
    the result (`Raised`).
    """

    __slots__ = ("_token", "_tolerant", "failures", "result", "row")

    def __init__(
        self, failures: Failures, row: int | None = None, *, tolerant: bool = False
    ) -> None:
        self.failures = failures
        self.row = row
        self.result: Any = None
        self._tolerant = tolerant

    def __enter__(self) -> Self:
        global _running
        with _count:
            _running += 1
        self._token = _scope.set(self)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        global _running
        if isinstance(error, EXITS):
            die_as_if_killed(error)
        _scope.reset(self._token)
        with _count:
            _running -= 1
        if self._tolerant and isinstance(error, Exception):
            self.result = Raised(error)
            return True
        return False


_scope: ContextVar[Scope | None] = ContextVar("ray_resume_call", default=None)
_count = threading.Lock()
_running = 0


def current_scope() -> Scope:
    """Return the scope that this runs in."""
    scope = _scope.get()
    assert scope is not None, "no call is running here"
    return scope


def mark_failed(error: object, rows: Any = None) -> None:
    """Mark input rows of the current UDF call as failed; the job goes on without them.

    Their source stays pending: none of its rows is in the output when ``resumable_write`` returns,
    and the next run reads it again. Failed in ``max_failed_runs`` runs, it is quarantined. With
    ``on_error="dead_letter"`` the rows go to the checkpoint's dead letters instead, and the source
    can complete.

    Return no output for these rows; a generator marks a row before it yields its output. (Output
    row i of a ``one_to_one`` UDF then comes from the i-th row that has not failed. It may also
    return a row for each input row: those of the failed ones are removed.) Outside
    ``resumable_write`` it does nothing.

    Args:
        error: an exception, or whatever ``str()`` makes a message of; 2,000 characters are kept.
        rows: a boolean mask or positions in the call's input; by default all of it. In a row-wise
            UDF: the row.

    Raises:
        ValueError: ``rows`` are not rows of the call.
        ResumeError: it is called by another thread than the UDF's.

    Example::

        @resumable
        def decode(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            good = np.array([is_image(data) for data in batch["bytes"]])
            mark_failed("not an image", ~good)
            return {"image": decoded(batch["bytes"][good])}
    """
    scope = _scope.get()
    if scope is not None:
        if scope.row is None:
            scope.failures.mark(error, rows)
        elif _mask(rows, 1).any():
            scope.failures.mark(error, [scope.row])
    elif _running:
        # Silence here would lose the rows: they would be taken for dropped.
        raise ResumeError(
            "mark_failed was called by a thread that is not the UDF's own, so it is not known "
            "whose rows these are. Collect the failed rows, and mark them before the UDF returns."
        )


def _mask(rows: Any, count: int) -> npt.NDArray[np.bool_]:
    if rows is None:
        return np.ones(count, dtype=bool)
    chosen = np.atleast_1d(np.asarray(rows))
    if chosen.dtype == np.bool_:
        if chosen.shape != (count,):
            raise ValueError(
                f"mark_failed got a mask of shape {chosen.shape}, and the call has {count} rows."
            )
        return chosen
    mask = np.zeros(count, dtype=bool)
    if chosen.size == 0:
        return mask
    if not np.issubdtype(chosen.dtype, np.integer) or chosen.ndim != 1:
        raise ValueError(
            f"mark_failed got rows of type {chosen.dtype}: give a boolean mask or positions."
        )
    if chosen.min() < 0 or chosen.max() >= count:
        raise ValueError(
            f"mark_failed got positions from {chosen.min()} to {chosen.max()}, and the call has "
            f"the rows 0 .. {count - 1}."
        )
    mask[chosen] = True
    return mask
