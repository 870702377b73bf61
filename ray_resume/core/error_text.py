"""The text of an exception, as a record keeps it. Pure."""

from __future__ import annotations

import re
import traceback

__all__ = ["MAX_ERROR_CHARS", "message_of", "text_of"]

MAX_ERROR_CHARS = 2_000
"""The longest text of an error that is kept."""

_CHAINED = "\nThe above exception was the direct cause of the following exception:"
# Ray Data adds to the text of an error how often it has tried, and advice about retries.
_ADVICE = re.compile(r"\nFailed to [^\n]* after \d+/\d+ attempts .*?to be transient\.", re.DOTALL)
_FRAME = re.compile(r'^  File "(.+)", line (\d+), in (.+)$', re.MULTILINE)


def message_of(error: BaseException) -> str:
    """Say what ended a run, in a line or a few: the type and message of the error, and its place.

    Ray raises an error of a task with the traceback of the task in its text, and the error of a UDF
    behind one of its own. The innermost error tells most.
    """
    cause = getattr(error, "cause", None)
    if not isinstance(cause, BaseException):
        return text_of(error)
    inner, is_chained, _ = str(error).partition(_CHAINED)
    if not is_chained:
        return text_of(cause)
    # The message comes after the last frame, whose lines are indented.
    lines = inner.rstrip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  ")]
    message = "\n".join(lines[frames[-1] + 1 :] if frames else lines[-1:])
    place = _FRAME.findall(inner)
    return text_of(message + (" ({}:{}, in {})".format(*place[-1]) if place else ""))


def text_of(error: object) -> str:
    """Say what went wrong in a line or a few: an exception with the place that raised it."""
    if isinstance(error, BaseException):
        text = "".join(traceback.format_exception_only(error)).strip()
        frames = traceback.extract_tb(error.__traceback__)
        if frames:
            text += f" ({frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name})"
    else:
        text = str(error)
    text = _ADVICE.sub("", text)
    # Lone surrogates, of undecodable bytes say, could not be stored as UTF-8.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 1] + "…"
