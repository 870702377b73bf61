"""Lists of output files, as columns: what a folder holds and what records list, compared at once.

Names in the usual format (`filenames.packed`) are kept in 27 bytes, in a numpy array; the others,
those in subfolders for one, as they are.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from ray_resume.core.digests import Positions
from ray_resume.core.filenames import (
    ENDINGS,
    PACKED_BYTES,
    OutputName,
    is_usual_run,
    packed,
    unpacked,
)
from ray_resume.core.records import Flag
from ray_resume.core.snapshot import Records, Union

__all__ = ["OutputFileSet", "listed_files", "missing_files", "other_rows", "packed_files"]

_AT_ONCE = 1 << 16
_RANDOM = slice(18, 26)
_IN_HEAD = (
    ("checkpoint", slice(0, 4)),
    ("run", slice(4, 10)),
    ("random", _RANDOM),
    ("ending", slice(26, 27)),
)
_DASHES = [8, 21, 38]
_STEM = 55
# Where the digits of a stem are.
_DIGITS = [slice(0, 8), slice(9, 21), slice(22, 38), slice(39, _STEM)]
_VALUES = np.full(256, 255, np.uint8)
_VALUES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)

Rows = npt.NDArray[np.uint8]


class OutputFileSet(Collection[str]):
    """Names of files: ``usual`` ones packed, an array of shape ``(n, 27)``, and ``others``."""

    def __init__(self, usual: Rows, others: Collection[str] = ()) -> None:
        self.usual = usual
        self.others = frozenset(others)
        self._by_random: tuple[npt.NDArray[np.uint64], Positions] | None = None

    @classmethod
    def of(cls, names: Iterable[str]) -> OutputFileSet:
        """Make a list of names."""
        if isinstance(names, OutputFileSet):
            return names
        usual: list[Rows] = [np.empty((0, PACKED_BYTES), np.uint8)]
        others: list[str] = []
        rest = iter(names)
        while part := list(itertools.islice(rest, _AT_ONCE)):
            # Nearly always all of them are alike.
            for number, ending in enumerate(ENDINGS[:1]):
                length = _STEM + 1 + len(ending)
                whole = "".join(part)
                if set(map(len, part)) == {length} and whole.isascii():
                    packed, fits = _pack(whole, length, number)
                    if fits.all():
                        usual.append(packed)
                        part = []
            for number, ending in enumerate(ENDINGS):
                tail = f".{ending}"
                length = _STEM + len(tail)
                alike = [n for n in part if len(n) == length and n.endswith(tail) and n.isascii()]
                if not alike:
                    continue
                packed, fits = _pack("".join(alike), length, number)
                usual.append(packed[fits])
                others += [alike[position] for position in np.flatnonzero(~fits)]
                if len(alike) == len(part):
                    part = []
                    break
                taken = set(alike)
                part = [name for name in part if name not in taken]
            others += part
        return cls(np.concatenate(usual), others)

    @override
    def __len__(self) -> int:
        return len(self.usual) + len(self.others)

    @override
    def __iter__(self) -> Iterator[str]:
        data = self.usual.tobytes()
        for start in range(0, len(data), PACKED_BYTES):
            yield unpacked(data[start : start + PACKED_BYTES])
        yield from self.others

    @override
    def __contains__(self, name: object) -> bool:
        if name in self.others:
            return True
        if not isinstance(name, str):
            return False
        one = OutputFileSet.of([name])
        return bool(len(one.usual) and self.holds(one.usual)[0])

    def holds(self, wanted: Rows) -> npt.NDArray[np.bool_]:
        """Say of each packed name whether it is here."""
        found = np.zeros(len(wanted), bool)
        if not len(self.usual) or not len(wanted):
            return found
        if self._by_random is None:
            random = _random(self.usual)
            order = np.argsort(random)
            self._by_random = random[order], order
        ordered, order = self._by_random
        # In ascending order: a million searches that jump about take ten times as long.
        random = _random(wanted)
        asked = np.argsort(random)
        mine, theirs = _names(self.usual), _names(wanted)
        # A part at a time, since names are compared whole.
        for start in range(0, len(asked), _AT_ONCE):
            part = asked[start : start + _AT_ONCE]
            rank = np.searchsorted(ordered, random[part]).astype(np.int64)
            left = np.arange(len(part))
            while len(left):
                left = left[rank[left] < len(ordered)]
                left = left[ordered[rank[left]] == random[part[left]]]
                same = mine[order[rank[left]]] == theirs[part[left]]
                found[part[left[same]]] = True
                left = left[~same]
                rank[left] += 1
        return found

    def without(self, other: OutputFileSet) -> OutputFileSet:
        """Return those that are not in ``other``."""
        return OutputFileSet(
            _where(self.usual, ~other.holds(self.usual)), self.others - other.others
        )

    def made_by(self, checkpoint: str, runs: Collection[str], *, known: bool) -> OutputFileSet:
        """Return the output files of ``checkpoint`` that are of ``runs``, or of none of them.

        Those of ``runs`` are sure to have been written where they are: none is a copy of a user's.
        """
        ours = _where(self.usual, self._is_of(checkpoint))
        numbers = _numbers(ours[:, 4:10])
        wanted = [int.from_bytes(bytes.fromhex(run), "big") for run in runs if is_usual_run(run)]
        ours = _where(ours, np.isin(numbers, np.array(wanted, np.uint64), invert=not known))
        others = [
            name
            for name in self.others
            if (parsed := OutputName.parse(name)) is not None
            and parsed.checkpoint == checkpoint
            and (parsed.run_id in runs) == known
            and (parsed.in_place or not known)
        ]
        return OutputFileSet(ours, others)

    def _is_of(self, checkpoint: str) -> npt.NDArray[np.bool_]:
        heads = np.ascontiguousarray(self.usual[:, :4]).view(np.uint32).ravel()
        mask: npt.NDArray[np.bool_] = heads == np.frombuffer(bytes.fromhex(checkpoint), np.uint32)
        return mask

    def not_of(self, checkpoint: str) -> OutputFileSet:
        """Return the files that are no output files of ``checkpoint``, or may be copies of some."""
        foreign = _where(self.usual, ~self._is_of(checkpoint))
        others = [
            name
            for name in self.others
            if (parsed := OutputName.parse(name)) is None
            or parsed.checkpoint != checkpoint
            or not parsed.in_place
        ]
        return OutputFileSet(foreign, others)

    def checkpoints(self) -> Counter[str]:
        """Count the output files of each checkpoint by its id, where they were written."""
        heads = np.ascontiguousarray(self.usual[:, :4]).view("V4").ravel()
        ids, counts = np.unique(heads, return_counts=True)
        found = Counter(
            {bytes(head).hex(): count for head, count in zip(ids, counts.tolist(), strict=True)}
        )
        for name in self.others:
            parsed = OutputName.parse(name)
            if parsed is not None and parsed.in_place:
                found[parsed.checkpoint] += 1
        return found


def _where(rows: Rows, mask: npt.NDArray[np.bool_]) -> Rows:
    return rows if mask.all() else rows[mask]


def listed_files(union: Union, rows: Positions | None = None) -> OutputFileSet:
    """Return the files that the records in ``rows`` list, or all records.

    Raises:
        CheckpointError: a record is damaged.
    """
    every = np.arange(len(union)) if rows is None else rows
    usual, others = packed_files(union, every)[1], set[str]()
    for row in other_rows(union, every).tolist():
        others.update(union.record(row).files)
    return OutputFileSet(*_sorted_out(usual, others))


def packed_files(union: Union, rows: Positions) -> tuple[Positions, Rows]:
    """Return which of ``rows`` have their file in the head of their record, and these, packed."""
    with_file = rows[union.column("flags", rows) & Flag.FILE != 0]
    packed = np.empty((len(with_file), PACKED_BYTES), np.uint8)
    for start in range(0, len(with_file), _AT_ONCE):
        part, some = packed[start : start + _AT_ONCE], with_file[start : start + _AT_ONCE]
        heads = union.heads(some)
        for name, place in _IN_HEAD:
            column = np.ascontiguousarray(heads[name])
            part[:, place] = column.view(np.uint8).reshape(-1, column.itemsize)
        digests = union.digests.take(some).to_bytes(8)
        part[:, 10:18] = np.frombuffer(digests, np.uint8).reshape(-1, 8)
        part[heads["flags"] & Flag.SHARED != 0, 10:18] = 0
    return with_file, packed


def other_rows(union: Union, rows: Positions) -> Positions:
    """Return those of ``rows`` whose records have more in them than a head, files perhaps."""
    with_more: Positions = rows[union.column("flags", rows) & Flag.MORE != 0]
    return with_more


def missing_files(records: Records, present: OutputFileSet) -> Iterator[tuple[str, str]]:
    """Yield the files of ``records`` that are not ``present``, each with a source that lists it."""
    rows, in_heads = packed_files(records.union, records.rows)
    gone = np.flatnonzero(~present.holds(in_heads))
    for place in gone.tolist():
        record = records.union.record(int(rows[place]))
        yield record.files[0], record.source_id
    # Of the others some may be packed all the same, as those of a source that has several.
    listed = [
        (file, row)
        for row in other_rows(records.union, records.rows).tolist()
        for file in records.union.record(row).files
    ]
    usual = [(short, place) for place, (file, _) in enumerate(listed) if (short := packed(file))]
    gone_places = [place for place, (file, _) in enumerate(listed) if file not in present.others]
    if usual:
        rows_of = np.frombuffer(b"".join(short for short, _ in usual), np.uint8)
        held = present.holds(rows_of.reshape(-1, PACKED_BYTES))
        there = {place for (_, place), is_held in zip(usual, held.tolist(), strict=True) if is_held}
        gone_places = [place for place in gone_places if place not in there]
    for place in gone_places:
        file, row = listed[place]
        yield file, records.union.record(row).source_id


def _sorted_out(usual: Rows, others: Iterable[str]) -> tuple[Rows, Collection[str]]:
    """Pack those of ``others`` that can be; leave out what is there twice.

    A source's own file is in no other record. One that is shared may be in many.
    """
    rest = OutputFileSet.of(others)
    shared = ~usual[:, 10:18].any(axis=1)
    if not shared.any() and not len(rest.usual):
        return usual, rest.others
    some = np.concatenate([usual[shared], rest.usual])
    own = usual[~shared]
    some = np.unique(some.view(f"V{PACKED_BYTES}").ravel()).view(np.uint8)
    some = some.reshape(-1, PACKED_BYTES)
    some = some[~OutputFileSet(own).holds(some)]
    return np.concatenate([own, some]), rest.others


def _pack(names: str, length: int, ending: int) -> tuple[Rows, npt.NDArray[np.bool_]]:
    """Pack names of one length, one after another; say which of them are as they should be."""
    text = np.frombuffer(names.encode(), np.uint8).reshape(-1, length)
    digits = np.take(_VALUES, np.concatenate([text[:, place] for place in _DIGITS], axis=1))
    tail = np.frombuffer(f".{ENDINGS[ending]}".encode(), np.uint8)
    fits = (
        (digits < 16).all(axis=1)
        & (text[:, _DASHES] == ord("-")).all(axis=1)
        & (text[:, _STEM:] == tail).all(axis=1)
    )
    packed = np.empty((len(text), PACKED_BYTES), np.uint8)
    packed[:, :26] = digits[:, ::2] << 4 | digits[:, 1::2] & 15
    packed[:, 26] = ending
    return packed, fits


def _random(rows: Rows) -> npt.NDArray[np.uint64]:
    words: npt.NDArray[np.uint64] = np.ascontiguousarray(rows[:, _RANDOM]).view(np.uint64).ravel()
    return words


def _names(rows: Rows) -> npt.NDArray[np.void]:
    """Look at each row as one value, to compare rows as a whole."""
    names: npt.NDArray[np.void] = np.ascontiguousarray(rows).view(f"V{PACKED_BYTES}").ravel()
    return names


def _numbers(rows: Rows) -> npt.NDArray[np.uint64]:
    """Read run ids of six bytes as numbers."""
    words = np.zeros((len(rows), 8), np.uint8)
    words[:, 2:] = rows
    return words.view(">u8").ravel().astype(np.uint64)
