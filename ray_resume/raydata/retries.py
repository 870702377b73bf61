"""How often the user wants Ray Data to retry what has raised an error.

Ray Data retries whole tasks (``DataContext.retried_map_errors``, ``max_map_retries``). Where
ray_resume catches an error before it ends a task, so that only a source or some rows fail, it
retries what raised the error itself.
"""

from __future__ import annotations

import contextlib
import random
import re
import traceback
from collections.abc import Iterable

from ray.data import DataContext

__all__ = ["backoff_s", "matches", "retries_of", "retries_some"]

_MAX_BACKOFF_S = 32.0

# User code may seed the generator that a process shares, and relies on what that draws next.
_RANDOM = random.SystemRandom()


def retries_of(error: BaseException) -> int:
    """Return how often the user wants a task repeated that raised ``error``."""
    context = DataContext.get_current()
    patterns = _patterns()
    wanted = patterns if isinstance(patterns, bool) else matches(patterns, error, error.__cause__)
    return int(getattr(context, "max_map_retries", 0)) if wanted else 0


def retries_some() -> bool:
    """Say whether :meth:`retries_of` is more than 0 for any error."""
    return bool(_patterns()) and getattr(DataContext.get_current(), "max_map_retries", 0) > 0


def backoff_s(attempt: int) -> float:
    """Return how many seconds to wait after the attempt of this number, from 0, has failed."""
    return min(2.0**attempt, _MAX_BACKOFF_S) * _RANDOM.uniform(0.5, 1.0)


def matches(patterns: Iterable[str], *errors: BaseException | None) -> bool:
    """Say whether one of ``patterns`` is in ``Class: text`` of an error, or matches it.

    As in Ray Data, a pattern may be a regular expression.
    """
    text = " ".join(
        "".join(traceback.format_exception_only(error)).rstrip("\n")
        for error in errors
        if error is not None
    )
    for pattern in patterns:
        if pattern in text:
            return True
        with contextlib.suppress(re.error):
            if re.search(pattern, text):
                return True
    return False


def _patterns() -> bool | list[str]:
    # Older versions have neither setting.
    patterns: bool | list[str] = getattr(DataContext.get_current(), "retried_map_errors", False)
    return patterns
