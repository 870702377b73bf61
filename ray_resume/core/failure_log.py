"""Why sources have failed, in little memory: perhaps all of a million did, for one reason. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from ray_resume.core.wording import counted

__all__ = ["FailureLog", "ReadErrors", "split_reason"]

# Repeats are recognized among so many failures of a source.
_MOST_FAILURES = 10_000

# Errors are kept in full up to this many characters together; of what differs after that, so much.
_ALL_CHARS = 32 << 20
_FEW_CHARS = 100

# The exceptions of readers are kept up to this many bytes together; one of them is raised.
_MAX_CAUSE_BYTES = 1 << 20

# What `FailureLog.why` says. A stage is a method and a UDF: "map_batches(clean)".
_IN_STAGE = re.compile(r"[\d,]+ rows? failed, the first in (.+?): (.*)", re.DOTALL)
_IN_READ = re.compile(r"its reader failed after [\d,]+ rows?: (.*)", re.DOTALL)


@dataclass(slots=True)
class _SourceFailures:
    error: str
    rows: int
    first: int
    read: bool = False
    # Only few sources fail more than once in a run.
    others: set[int] | None = None


class FailureLog:
    """The failures of rows, by source."""

    def __init__(self) -> None:
        self._failures: dict[int, _SourceFailures] = {}
        self._texts: dict[str, str] = {}
        self._chars = 0

    def add(self, source: int, total: int, rows: int, error: str, *, read: bool = False) -> bool:
        """Note that ``rows`` rows with tokens of that ``total`` have failed; False for a repeat.

        Args:
            read: the reader failed, after so many rows.
        """
        known = self._failures.get(source)
        if known is None:
            self._failures[source] = _SourceFailures(self._kept(error), rows, total, read)
            return True
        if total == known.first or (known.others is not None and total in known.others):
            return False
        if known.others is None:
            known.others = set()
        # Only a repeat is counted twice by forgetting it, and memory stays bounded.
        if len(known.others) < _MOST_FAILURES:
            known.others.add(total)
        if not read:
            known.rows += rows
        return True

    def forget(self, source: int) -> bool:
        """Forget a source that has become complete; return whether rows of it had failed."""
        return self._failures.pop(source, None) is not None

    def sources(self) -> Collection[int]:
        """Return the numbers of the sources."""
        return self._failures.keys()

    def why(self, source: int) -> str | None:
        """Say why a source has failed; None if it has not."""
        known = self._failures.get(source)
        if known is None:
            return None
        if known.read:
            return f"its reader failed after {counted(known.rows, 'row')}: {known.error}"
        return f"{counted(known.rows, 'row')} failed, the first in {known.error}"

    def _kept(self, error: str) -> str:
        kept = self._texts.get(error)
        if kept is None:
            if self._chars + len(error) > _ALL_CHARS and len(error) > _FEW_CHARS:
                return self._kept(f"{error[: _FEW_CHARS - 1]}…")
            kept = self._texts[error] = error
            self._chars += len(error)
        return kept


@dataclass
class ReadErrors:
    """Which sources could not be read, and the exceptions of the first few of them."""

    _causes: dict[int, bytes] = field(default_factory=dict)
    _cause_bytes: int = 0
    _transient: set[int] = field(default_factory=set)

    def add(self, source: int, cause: bytes, *, transient: bool) -> None:
        """Note that the reader of ``source`` raised; the first exception of a source is kept."""
        if transient:
            self._transient.add(source)
        else:
            self._transient.discard(source)
        if not self._causes.get(source):
            kept = cause if self._cause_bytes + len(cause) <= _MAX_CAUSE_BYTES else b""
            self._causes[source] = kept
            self._cause_bytes += len(kept)

    def forget(self, source: int) -> None:
        """Forget a source, which has become complete."""
        self._cause_bytes -= len(self._causes.pop(source, b""))
        self._transient.discard(source)

    def sources(self) -> Collection[int]:
        """Return the numbers of the sources, in the order in which they failed."""
        return self._causes.keys()

    def cause(self, source: int) -> bytes:
        """Return the pickled exception of a source, empty if it is not kept."""
        return self._causes.get(source, b"")

    def is_transient(self, source: int) -> bool:
        """Say whether the error tells about the storage at that time, not about the source."""
        return source in self._transient


def split_reason(text: str) -> tuple[str, str]:
    """Split what is on record of a failed source into the stage and its error.

    The stage is empty if the text names none.
    """
    found = _IN_STAGE.match(text)
    if found:
        return found[1], found[2]
    found = _IN_READ.match(text)
    return ("read", found[1]) if found else ("", text)
