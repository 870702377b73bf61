"""Failures by stage and error: errors that differ only in numbers and names count as one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ray_resume.checkpoint.dead_letters import DeadLetterStore
from ray_resume.checkpoint.status import STATES, last_line
from ray_resume.core.columns import numbers_of, text_of
from ray_resume.core.failure_log import split_reason
from ray_resume.core.records import State
from ray_resume.core.snapshot import Snapshot

__all__ = ["FailureGroup", "Failures", "failures_of", "letters_of"]

MOST_GROUPS = 20
"""A report shows so many groups, the largest."""

MOST_LETTERS = 200
"""So many files of dead letters are read for their errors."""

# Numbers, and what stands in quotation marks: an error says in them which row it was.
_DETAIL = re.compile(r"0x[0-9a-fA-F]+|\d+(?:\.\d+)?|'[^']*'|\"[^\"]*\"")
# Where an error was raised: `core.error_text` adds it.
_PLACE = re.compile(r" \([^()]*:\d+, in [^()]*\)$")
_MAX_CHARS = 300
_MOST_KEYS = 100_000


@dataclass(frozen=True)
class FailureGroup:
    """Failures in one stage with like errors.

    Attributes:
        stage: empty if it is unknown.
        error: the line of their error that tells most, with "…" for what differs.
        count: how many sources, or rows in dead letters.
        source_id, example: one of them, and its error as a whole.
    """

    stage: str
    error: str
    count: int
    source_id: str
    example: str


@dataclass(frozen=True)
class Failures:
    """The largest groups, and how many others there are, of how many sources or rows."""

    groups: tuple[FailureGroup, ...] = ()
    more_groups: int = 0
    more: int = 0


class _Grouping:
    """Groups by stage and error, in bounded memory: what comes last is one group of its own."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], FailureGroup] = {}
        self._rest = 0

    def add(self, stage: str, error: str, count: int, source_id: str) -> None:
        key = stage, _alike(error)
        known = self._groups.get(key)
        if known is not None:
            self._groups[key] = replace(known, count=known.count + count)
        elif len(self._groups) < _MOST_KEYS:
            self._groups[key] = FailureGroup(*key, count, source_id, error)
        else:
            self._rest += count

    def largest(self) -> Failures:
        groups = sorted(self._groups.values(), key=lambda one: (-one.count, one.stage, one.error))
        rest = groups[MOST_GROUPS:]
        more = sum(group.count for group in rest) + self._rest
        return Failures(tuple(groups[:MOST_GROUPS]), len(rest) + (self._rest > 0), more)


def failures_of(snapshot: Snapshot) -> Failures:
    """Group the sources that failed or are quarantined."""
    grouping = _Grouping()
    bad = np.flatnonzero(snapshot.in_state(*(set(STATES.values()) - {State.COMPLETED})))
    for _, batch in snapshot.batches(bad):
        # Many sources have the same error.
        errors = batch.column("error").dictionary_encode()
        codes = numbers_of(errors.indices, "i4", unknown=-1)
        ids = batch.column("source_id")
        values, first, counts = np.unique(codes, return_index=True, return_counts=True)
        for code, at, count in zip(values.tolist(), first.tolist(), counts.tolist(), strict=True):
            text = text_of(errors.dictionary[code].as_py()) if code >= 0 else "no error on record"
            grouping.add(*split_reason(text), count, text_of(ids[at].as_py()))
    return grouping.largest()


def letters_of(store: DeadLetterStore, names: Iterable[str]) -> Failures:
    """Group rows in dead letters, of these files."""
    grouping = _Grouping()
    for stage, error, source_id in _reasons(store, names):
        grouping.add(stage, error, 1, source_id)
    return grouping.largest()


def _reasons(store: DeadLetterStore, names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    for name in names:
        yield from store.reasons(name)


def _alike(error: str) -> str:
    line = _DETAIL.sub("…", _PLACE.sub("", _telling_line(error)))
    return line if len(line) <= _MAX_CHARS else f"{line[: _MAX_CHARS - 1]}…"


def _telling_line(error: str) -> str:
    """Return the line with the type and the message: the last of a traceback, else the first."""
    if "Traceback (most recent call last)" in error:
        return last_line(error)
    return error.strip().split("\n", 1)[0]
