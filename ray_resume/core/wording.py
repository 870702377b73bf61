"""Numbers in sentences: thousands separators, and nouns that agree with their number. Pure."""

from __future__ import annotations

__all__ = ["counted", "duration"]

_UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


def counted(number: int, noun: str) -> str:
    """Return a number and its noun: "1 row", "1,234 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a span of time in the two units that suit it: "8 s", "2 min 5 s", "2 d 4 h"."""
    whole = max(0, round(seconds))
    for length, unit, below_length, below in _UNITS:
        if whole >= length:
            return f"{whole // length:,} {unit} {whole % length // below_length} {below}"
    return f"{whole} s"
