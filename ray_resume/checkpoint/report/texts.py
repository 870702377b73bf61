"""Texts of a report: sizes, and long texts cut. Every text that comes from data is hostile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ray_resume.checkpoint.check_report import plain
from ray_resume.core.wording import duration

__all__ = ["file_size", "middle_cut", "number", "shown", "span", "unique"]

_MAX_CHARS = 1000
_LABEL_CHARS = 42
_SHORT_S = 10


def shown(text: str) -> str:
    """Return a text that a page can hold: printable, and not too long. It is not yet HTML."""
    cut = text if len(text) <= _MAX_CHARS else f"{text[: _MAX_CHARS - 1]}…"
    return "\n".join(map(plain, cut.split("\n")))


def middle_cut(text: str, most: int = _LABEL_CHARS) -> str:
    """Return a label of one line: of a long path, the end says most."""
    if len(text) <= most:
        return plain(text)
    head = most // 3
    return f"{plain(text[:head])}…{plain(text[head + 1 - most :])}"


def unique(labels: Iterable[str]) -> Iterator[str]:
    """Yield the labels, with a number behind each that was there before."""
    known: dict[str, int] = {}
    for label in labels:
        known[label] = known.get(label, 0) + 1
        yield label if known[label] == 1 else f"{label} #{known[label]}"


def file_size(size: float) -> str:
    """Return a number of bytes in the unit that suits it: "512 B", "1.5 MB"."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = 0
    while size >= 1000 and power < len(units) - 1:
        size /= 1000
        power += 1
    return (
        f"{size:,.0f} {units[power]}" if not power or size >= 100 else f"{size:,.1f} {units[power]}"
    )


def number(value: float) -> str:
    """Return a number with thousands separators, and a digit after the point of a small one."""
    if isinstance(value, int) or value >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.1f}"


def span(seconds: float) -> str:
    """Return a span of time; a short one to the hundredth of a second."""
    return f"{seconds:.2f} s" if seconds < _SHORT_S else duration(seconds)
