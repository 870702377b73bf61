"""Lists of output files, as columns: what a folder holds and what records list, compared at once.

There may be millions of names. A name in the standard format, in no subfolder and with one of these
endings, takes 27 bytes in a numpy array. Other names are kept as text.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from ray_resume.core.columns import bytes_of, lengths_of, parents_of, text_of, texts
from ray_resume.core.digests import Positions
from ray_resume.core.filenames import MERGED_DIGEST, OutputName, is_usual_run
from ray_resume.core.snapshot import Records, Snapshot

__all__ = ["OutputFileSet", "listed_files", "missing_files"]

_BATCH_ROWS = 1 << 16

_ENDINGS = ("parquet", "json", "csv", "orc", "feather", "tar", "npy", "tfrecords", "png", "jpeg")
# Checkpoint (4 bytes), run (6), digest (8), random part (8), number of the ending (1).
_COMPACT_BYTES = 27

_DIGEST = slice(10, 18)
_RANDOM = slice(18, 26)
_DASHES = [8, 21, 38]
_STEM = 55
# Where the digits of a stem are.
_DIGITS = [slice(0, 8), slice(9, 21), slice(22, 38), slice(39, _STEM)]
_VALUES = np.full(256, 255, np.uint8)
_VALUES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)

# The digest in the name of a merged file begins with it.
_MERGED = np.frombuffer(bytes.fromhex(MERGED_DIGEST), np.uint8)

Rows = npt.NDArray[np.uint8]


class OutputFileSet(Collection[str]):
    """Names of files: ``compact`` ones, an array of shape ``(n, 27)``, and ``plain`` text."""

    def __init__(self, compact: Rows, plain: Collection[str] = ()) -> None:
        self.compact = compact
        self.plain = frozenset(plain)
        self._by_random: tuple[npt.NDArray[np.uint64], Positions] | None = None

    @classmethod
    def of(cls, names: Iterable[str]) -> OutputFileSet:
        """Make a list of names."""
        if isinstance(names, OutputFileSet):
            return names
        compact: list[Rows] = [np.empty((0, _COMPACT_BYTES), np.uint8)]
        plain: list[str] = []
        rest = iter(names)
        while part := list(itertools.islice(rest, _BATCH_ROWS)):
            found, fits = _compact(texts([bytes_of(name) for name in part]))
            compact.append(found)
            plain += [part[position] for position in np.flatnonzero(~fits).tolist()]
        return cls(np.concatenate(compact), plain)

    @override
    def __len__(self) -> int:
        return len(self.compact) + len(self.plain)

    @override
    def __iter__(self) -> Iterator[str]:
        data = self.compact.tobytes()
        for start in range(0, len(data), _COMPACT_BYTES):
            yield _expanded(data[start : start + _COMPACT_BYTES])
        yield from self.plain

    @override
    def __contains__(self, name: object) -> bool:
        if name in self.plain:
            return True
        if not isinstance(name, str):
            return False
        one = OutputFileSet.of([name])
        return bool(len(one.compact) and self.holds(one.compact)[0])

    def holds(self, wanted: Rows) -> npt.NDArray[np.bool_]:
        """Return for each compact name whether it is in the set."""
        found = np.zeros(len(wanted), bool)
        if not len(self.compact) or not len(wanted):
            return found
        if self._by_random is None:
            random = _random(self.compact)
            order = np.argsort(random)
            self._by_random = random[order], order
        ordered, order = self._by_random
        # In ascending order: a million searches that jump about take ten times as long.
        random = _random(wanted)
        asked = np.argsort(random)
        mine, theirs = _names(self.compact), _names(wanted)
        # A part at a time, since names are compared whole.
        for start in range(0, len(asked), _BATCH_ROWS):
            part = asked[start : start + _BATCH_ROWS]
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
        """Return the names that are not in ``other``."""
        return OutputFileSet(
            _where(self.compact, ~other.holds(self.compact)), self.plain - other.plain
        )

    def made_by(self, checkpoint: str, runs: Collection[str], *, known: bool) -> OutputFileSet:
        """Return the output files of ``checkpoint`` that are of ``runs``, or of none of them.

        Each file of ``runs`` was written where it is: none is a copy that a user made.
        """
        ours = _where(self.compact, self._is_of(checkpoint))
        numbers = _numbers(ours[:, 4:10])
        wanted = [int.from_bytes(bytes.fromhex(run), "big") for run in runs if is_usual_run(run)]
        ours = _where(ours, np.isin(numbers, np.array(wanted, np.uint64), invert=not known))
        plain = [
            name
            for name in self.plain
            if (parsed := OutputName.parse(name)) is not None
            and parsed.checkpoint == checkpoint
            and (parsed.run_id in runs) == known
            and (parsed.in_place or not known)
        ]
        return OutputFileSet(ours, plain)

    def _is_of(self, checkpoint: str) -> npt.NDArray[np.bool_]:
        heads = np.ascontiguousarray(self.compact[:, :4]).view(np.uint32).ravel()
        mask: npt.NDArray[np.bool_] = heads == np.frombuffer(bytes.fromhex(checkpoint), np.uint32)
        return mask

    def not_of(self, checkpoint: str) -> OutputFileSet:
        """Return the files that are no output files of ``checkpoint``, or may be copies of some."""
        foreign = _where(self.compact, ~self._is_of(checkpoint))
        plain = [
            name
            for name in self.plain
            if (parsed := OutputName.parse(name)) is None
            or parsed.checkpoint != checkpoint
            or not parsed.in_place
        ]
        return OutputFileSet(foreign, plain)

    def checkpoints(self) -> Counter[str]:
        """Count the output files of each checkpoint by its id, where they were written."""
        heads = np.ascontiguousarray(self.compact[:, :4]).view("V4").ravel()
        ids, counts = np.unique(heads, return_counts=True)
        found = Counter(
            {bytes(head).hex(): count for head, count in zip(ids, counts.tolist(), strict=True)}
        )
        for name in self.plain:
            parsed = OutputName.parse(name)
            if parsed is not None and parsed.in_place:
                found[parsed.checkpoint] += 1
        return found


def _where(rows: Rows, mask: npt.NDArray[np.bool_]) -> Rows:
    return rows if mask.all() else rows[mask]


def listed_files(snapshot: Snapshot, rows: Positions | None = None) -> OutputFileSet:
    """Return the files that the records in ``rows`` list, or all records."""
    compact: list[Rows] = [np.empty((0, _COMPACT_BYTES), np.uint8)]
    plain: set[str] = set()
    for _, names in _listed(snapshot, rows):
        found, fits = _compact(names)
        compact.append(found)
        plain.update(text_of(names[place].as_py()) for place in np.flatnonzero(~fits).tolist())
    return OutputFileSet(_without_repeats(np.concatenate(compact)), plain)


def missing_files(records: Records, present: OutputFileSet) -> Iterator[tuple[str, str]]:
    """Yield the files of ``records`` that are not ``present``, each with a source that lists it."""
    snapshot = records.snapshot
    listing: list[Positions] = []
    compact: list[Rows] = [np.empty((0, _COMPACT_BYTES), np.uint8)]
    for rows, names in _listed(snapshot, records.rows):
        found, fits = _compact(names)
        compact.append(found)
        listing.append(rows[fits])
        for place in np.flatnonzero(~fits).tolist():
            name = text_of(names[place].as_py())
            if name not in present.plain:
                yield name, snapshot.record(int(rows[place])).source_id
    if listing:
        # All at once: each look-up goes through all that is there.
        every = np.concatenate(compact)
        rows = np.concatenate(listing)
        for place in np.flatnonzero(~present.holds(every)).tolist():
            yield _expanded(every[place].tobytes()), snapshot.record(int(rows[place])).source_id


def _listed(snapshot: Snapshot, rows: Positions | None) -> Iterator[tuple[Positions, pa.Array]]:
    """Yield the names of files, as columns of bytes, with the row that lists each."""
    for some, batch in snapshot.batches(rows):
        files = batch.column("files")
        yield some[parents_of(files)], files.flatten()


def _without_repeats(compact: Rows) -> Rows:
    """Return each name once.

    A source's own file is in no other record. One that is shared may be in many.
    """
    digests = compact[:, _DIGEST]
    shared = ~digests.any(axis=1) | (digests[:, : len(_MERGED)] == _MERGED).all(axis=1)
    if not shared.any():
        return compact
    distinct = np.unique(_names(compact[shared])).view(np.uint8).reshape(-1, _COMPACT_BYTES)
    return np.concatenate([compact[~shared], distinct])


def _compact(names: pa.Array) -> tuple[Rows, npt.NDArray[np.bool_]]:
    """Return the compact form of names, a column of bytes, and which of them have one."""
    if not len(names):
        return np.empty((0, _COMPACT_BYTES), np.uint8), np.empty(0, bool)
    offsets = np.frombuffer(names.buffers()[1], np.int32)[names.offset :][: len(names) + 1]
    data = np.frombuffer(names.buffers()[2] or b"", np.uint8)
    lengths = lengths_of(names)
    compact = np.empty((len(names), _COMPACT_BYTES), np.uint8)
    fits = np.zeros(len(names), bool)
    for number, ending in enumerate(_ENDINGS):
        length = _STEM + 1 + len(ending)
        alike = np.flatnonzero((lengths == length) & ~fits)
        if len(alike):
            # Nearly always all of them are alike, and stand one after another.
            text = (
                data[offsets[0] : offsets[-1]].reshape(-1, length)
                if len(alike) == len(names)
                else data[offsets[alike][:, np.newaxis] + np.arange(length)]
            )
            compact[alike], fits[alike] = _compact_alike(text, number)
    return (compact if fits.all() else compact[fits]), fits


def _compact_alike(text: Rows, ending: int) -> tuple[Rows, npt.NDArray[np.bool_]]:
    """Do as `_compact` with names of one length, one a row."""
    digits = np.take(_VALUES, np.concatenate([text[:, place] for place in _DIGITS], axis=1))
    tail = np.frombuffer(f".{_ENDINGS[ending]}".encode(), np.uint8)
    fits = (
        (digits < 16).all(axis=1)
        & (text[:, _DASHES] == ord("-")).all(axis=1)
        & (text[:, _STEM:] == tail).all(axis=1)
    )
    compact = np.empty((len(text), _COMPACT_BYTES), np.uint8)
    compact[:, :26] = digits[:, ::2] << 4 | digits[:, 1::2] & 15
    compact[:, 26] = ending
    return compact, fits


def _expanded(compact: bytes) -> str:
    text = compact.hex()
    stem = f"{text[:8]}-{text[8:20]}-{text[20:36]}-{text[36:52]}"
    return f"{stem}.{_ENDINGS[compact[26]]}"


def _random(rows: Rows) -> npt.NDArray[np.uint64]:
    words: npt.NDArray[np.uint64] = np.ascontiguousarray(rows[:, _RANDOM]).view(np.uint64).ravel()
    return words


def _names(rows: Rows) -> npt.NDArray[np.void]:
    """Look at each row as one value, to compare rows as a whole."""
    names: npt.NDArray[np.void] = np.ascontiguousarray(rows).view(f"V{_COMPACT_BYTES}").ravel()
    return names


def _numbers(rows: Rows) -> npt.NDArray[np.uint64]:
    """Read run ids of six bytes as numbers."""
    words = np.zeros((len(rows), 8), np.uint8)
    words[:, 2:] = rows
    return words.view(">u8").ravel().astype(np.uint64)
