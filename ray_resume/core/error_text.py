"""The text of an exception, as a record keeps it. Pure."""

from __future__ import annotations

import traceback

__all__ = ["MAX_ERROR_CHARS", "text_of"]

MAX_ERROR_CHARS = 2_000
"""The longest text of an error that is kept."""


def text_of(error: object) -> str:
    """Say what went wrong in a line or a few: an exception with the place that raised it."""
    if isinstance(error, BaseException):
        text = "".join(traceback.format_exception_only(error)).strip()
        frames = traceback.extract_tb(error.__traceback__)
        if frames:
            text += f" ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})"
    else:
        text = str(error)
    # Lone surrogates, of undecodable bytes say, could not be stored as UTF-8.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 1] + "…"
