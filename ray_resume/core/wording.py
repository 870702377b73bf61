"""Numbers in sentences: thousands separators, and nouns that agree with their number. Pure."""

from __future__ import annotations

__all__ = ["age", "counted"]

_UNITS = (("d", 86400), ("h", 3600), ("min", 60))


def counted(number: int, noun: str) -> str:
    """Return a number and its noun: "1 row", "1,234 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def age(seconds: float) -> str:
    """Return a span of time in the unit that suits it: "3 s", "1.5 min", "2.0 h", "3.1 d"."""
    whole = max(0, int(seconds))
    for unit, length in _UNITS:
        if whole >= length:
            return f"{whole / length:,.1f} {unit}"
    return f"{whole} s"
