"""Times as people read them: how long ago, and by the clock with its zone."""

from __future__ import annotations

import time

from ray_resume.core.wording import duration

__all__ = ["moment", "time_text"]

_END_OF_TIME = 1e11


def moment(at: float) -> str:
    """Return how long ago a time was, and the time itself: logs may have another zone."""
    if not 0 <= at < _END_OF_TIME:
        return f"at an impossible time, {at}"
    return f"{duration(time.time() - at)} ago, {time_text(at)}"


def time_text(at: float) -> str:
    """Return a time of seconds since 1970 by the local clock, with its zone."""
    if not 0 <= at < _END_OF_TIME:
        return "?"
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(at))
