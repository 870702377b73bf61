"""Numbers and names in sentences: separators, nouns that agree, a few of many names. Pure."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["SOME", "counted", "duration", "some_of"]

SOME = 3
"""A message names so many examples at most."""

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


def some_of(names: Iterable[str]) -> str:
    """Return a few of the names, and how many more there are: "a, b, c and 4 more"."""
    every = list(names)
    more = f" and {len(every) - SOME} more" if len(every) > SOME else ""
    return ", ".join(every[:SOME]) + more
