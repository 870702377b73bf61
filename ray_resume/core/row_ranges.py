"""Row ranges: ``<path>#rows=<A>-<B>`` are the rows A to B - 1 of a file, in reading order. Pure.

How many ranges a file has is known once it was read to its end. The end of a file is a source of
its own, ``<path>#rows=end/<split_rows>``, without rows. Its record says how many ranges there are.
So a file is done if its end is completed, and as many ranges are. A run lists the end of each file,
and the ranges that are on record with the file's present content. All ranges of a file that has
changed are gone, whatever it has now.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ray_resume.core.columns import numbers, numbers_of, texts
from ray_resume.core.digests import Digests, Positions
from ray_resume.core.range_items import RangeItems
from ray_resume.core.record_log import Flag
from ray_resume.core.records import State
from ray_resume.core.snapshot import Snapshot
from ray_resume.core.sources import SourceTable

__all__ = ["end_id", "file_ends", "known_ranges", "lacking_ranges", "range_id"]

_NO_TEXTS = texts([]).cast(pa.large_binary())
_MARK = "#rows="
_MOST_DIGITS = 18


def range_id(file: str, number: int, split_rows: int) -> str:
    """Return the id of a range of a file. The last one may have fewer rows than its id says."""
    return f"{file}#rows={number * split_rows}-{(number + 1) * split_rows}"


def end_id(file: str, split_rows: int) -> str:
    """Return the id of the end of a file: what it says holds for ranges of that length alone."""
    return f"{file}#rows=end/{split_rows}"


def file_ends(
    files: SourceTable, split_rows: int, beside: SourceTable | None = None
) -> SourceTable:
    """Return the ends of files, which look as the files do; after the sources ``beside`` them."""
    others = [] if beside is None else list(beside)
    paths = [*(other.item for other in others), *map(str, files.items())]
    ids = [
        *(other.source_id for other in others),
        *(end_id(file, split_rows) for file in files.ids()),
    ]
    looks = files.fingerprints if beside is None else beside.fingerprints.joined(files.fingerprints)
    encoded = [one.encode("utf-8", "surrogatepass") for one in ids]
    lengths = np.fromiter(map(len, encoded), np.int32, len(encoded))
    return SourceTable.of_ranges(
        b"".join(encoded), lengths, looks, RangeItems.all(paths, len(others))
    )


def known_ranges(
    ends: SourceTable, snapshot: Snapshot, split_rows: int, *, ignore_changes: bool = False
) -> SourceTable:
    """Return the ranges that are known of files, which look as the files do now.

    Args:
        ends: the ends of the files, as :func:`file_ends` returned them.
        ignore_changes: whether ranges on record count although their file has changed.
    """
    names = [_file_of(ends.id_bytes(position)) for position in range(len(ends))]
    found = _on_record(names, snapshot, split_rows)
    same = _same(ends, found, snapshot)
    state = snapshot.column("state", found.rows)
    has_output = snapshot.column("flags", found.rows) & Flag.FILES != 0
    # One that was reset and has no output is as good as unknown.
    counts = (same | ignore_changes) & ((state != State.RESET.value) | has_output)
    if not counts.all():
        found = found.take(np.flatnonzero(counts))
    items = ends.ranges
    assert items is not None
    known = SourceTable.of_ranges(
        found.ids,
        found.lengths,
        ends.fingerprints.take(found.files),
        RangeItems(items.paths, items.files[found.files], found.ranges),
        snapshot.digests.take(found.rows),
    )
    return known.joined(_missing(ends, found, _counts(ends, snapshot, ignore_changes), split_rows))


def lacking_ranges(snapshot: Snapshot) -> int:
    """Count the ranges that are not on record, or were reset, of files whose end is completed."""
    is_end = snapshot.column("flags") & Flag.END != 0
    counts: dict[bytes, int] = {}
    for _, batch in snapshot.batches(np.flatnonzero(is_end & snapshot.in_state(State.COMPLETED))):
        names = (_file_of(name) for name in batch.column("source_id").to_pylist())
        counts.update(zip(names, batch.column("end").to_pylist(), strict=True))
    if not counts:
        return 0
    found = _on_record(list(counts), snapshot, None)
    there = found.files[snapshot.column("state", found.rows) != State.RESET.value]
    lacking = np.array(list(counts.values())) - np.bincount(there, minlength=len(counts))
    return int(lacking.clip(0).sum())


class _Found(NamedTuple):
    """Ranges on record: their rows in the snapshot, files (positions), numbers, and ids."""

    rows: Positions
    files: Positions
    ranges: npt.NDArray[np.int64]
    texts: pa.Array

    def take(self, positions: Positions) -> _Found:
        return _Found(
            self.rows[positions],
            self.files[positions],
            self.ranges[positions],
            self.texts.take(numbers(positions, "i8")),
        )

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        lengths: npt.NDArray[np.int64] = numbers_of(pc.binary_length(self.texts), "i8")
        return lengths.astype(np.int32)

    @property
    def ids(self) -> bytes:
        if not len(self.texts):
            return b""
        _, offsets, data = self.texts.buffers()
        ends = np.frombuffer(offsets, np.int64)[self.texts.offset :][: len(self.texts) + 1]
        return bytes(memoryview(data)[int(ends[0]) : int(ends[-1])])


def _on_record(of: Sequence[bytes], snapshot: Snapshot, split_rows: int | None) -> _Found:
    """Find the ranges on record of files, of that length; None: of any, not numbered."""
    names = texts(of)
    rows, files = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    ranges, found = [np.empty(0, np.int64)], [_NO_TEXTS]
    for some, batch in snapshot.batches():
        ids = batch.column("source_id")
        chosen, name, first, stop = _bounds(ids)
        if split_rows is not None:
            # Ranges of another length are of earlier runs, whose output goes.
            right = (first % split_rows == 0) & (stop - first == split_rows)
            if not right.all():
                chosen, first = chosen[right], first[right]
                name = name.take(numbers(np.flatnonzero(right), "i8"))
            first //= split_rows
        here = numbers_of(pc.index_in(name, names), "i4", unknown=-1).astype(np.int64)
        known = here >= 0
        if not known.all():
            chosen, here, first = chosen[known], here[known], first[known]
        rows.append(some[chosen])
        files.append(here)
        ranges.append(first)
        if len(chosen) < len(ids):
            ids = ids.take(numbers(chosen, "i8"))
        found.append(ids.cast(pa.large_binary()))
    return _Found(
        np.concatenate(rows),
        np.concatenate(files),
        np.concatenate(ranges),
        pa.concat_arrays(found),
    )


def _bounds(
    ids: pa.Array,
) -> tuple[Positions, pa.Array, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find the ids of ranges among ids: where they are, their files, their first rows and ends.

    In bytes, as a regular expression takes five times as long.
    """
    _, offsets, buffer = ids.buffers()
    bounds = np.frombuffer(offsets, np.int32)[ids.offset :][: len(ids) + 1].astype(np.int64)
    data = np.frombuffer(buffer or b"", np.uint8)[: bounds[-1]]
    start, end = bounds[:-1], bounds[1:]
    mark = _last(data, b"#", end)
    first = mark + len(_MARK)
    dash = _last(data, b"-", end)
    spelt = (mark >= start) & (first < dash) & (dash + 1 < end)
    spelt &= (dash - first <= _MOST_DIGITS) & (end - dash - 1 <= _MOST_DIGITS)
    chosen = np.flatnonzero(spelt)
    start, mark, first, dash, end = (at[chosen] for at in (start, mark, first, dash, end))
    good = np.ones(len(chosen), bool)
    for place, letter in enumerate(_MARK.encode()):
        good &= data[mark + place] == letter
    # A file may be called "a#rows=00-10". Only `range_id` gives a range its id, without such zeros.
    for begin, beyond in ((first, dash), (dash + 1, end)):
        good &= (data[begin] != ord("0")) | (beyond - begin == 1)
    texts_of = [_slices(first, dash, buffer), _slices(dash + 1, end, buffer)]
    for text in texts_of:
        good &= numbers_of(pc.ascii_is_decimal(text).cast(pa.uint8()), "u1").astype(bool)
    if not good.all():
        chosen, start, mark = chosen[good], start[good], mark[good]
        texts_of = [text.filter(pa.array(good)) for text in texts_of]
    rows, stops = (numbers_of(pc.cast(text, pa.int64()), "i8") for text in texts_of)
    return chosen, _slices(start, mark, buffer).cast(pa.binary()), rows, stops


def _last(data: npt.NDArray[np.uint8], letter: bytes, before: Positions) -> Positions:
    """Return where a letter stands last before each of these places, -1 where it does not."""
    at = np.append(-1, np.flatnonzero(data == ord(letter)))
    last: Positions = at[np.searchsorted(at, before) - 1]
    return last


def _slices(starts: Positions, ends: Positions, buffer: pa.Buffer) -> pa.Array:
    """Return those parts of a buffer, which follow one another; whether they are text is open."""
    between = np.append(np.stack([starts, ends], axis=1), 0)[:-1]
    offsets = pa.py_buffer(between.astype(np.int32))
    pieces = pa.Array.from_buffers(pa.string(), max(0, len(between) - 1), [None, offsets, buffer])
    return pieces.take(numbers(np.arange(0, len(between), 2), "i8"))


def _file_of(source_id: bytes) -> bytes:
    return source_id.rpartition(_MARK.encode())[0]


def _same(ends: SourceTable, found: _Found, snapshot: Snapshot) -> npt.NDArray[np.bool_]:
    """Say of each range on record whether its file looks as it did then."""
    now = ends.fingerprints.take(found.files)
    same: npt.NDArray[np.bool_] = (
        (snapshot.column("flags", found.rows) & (Flag.SIZE | Flag.MTIME) == now.known)
        & (snapshot.column("size", found.rows) == now.sizes)
        & (snapshot.column("mtime_ns", found.rows) == now.mtimes_ns)
    )
    return same


def _counts(ends: SourceTable, snapshot: Snapshot, ignore_changes: bool) -> npt.NDArray[np.int64]:
    """Return how many ranges each file has, -1 where its end is not on record."""
    counts = np.full(len(ends), -1, np.int64)
    rows = snapshot.find(ends.digests)
    known = np.flatnonzero(rows >= 0)
    rows = rows[known]
    empty: npt.NDArray[np.int64] = np.empty(0, np.int64)
    found = _Found(rows, known, empty, _NO_TEXTS)
    good = snapshot.column("state", rows) == State.COMPLETED.value
    good &= snapshot.column("flags", rows) & Flag.END != 0
    good &= _same(ends, found, snapshot) | ignore_changes
    rows, known = rows[good], known[good]
    file_of = dict(zip(rows.tolist(), known.tolist(), strict=True))
    for some, batch in snapshot.batches(rows):
        files = [file_of[row] for row in some.tolist()]
        counts[files] = numbers_of(batch.column("end"), "i8")
    return counts


def _missing(
    ends: SourceTable, found: _Found, counts: npt.NDArray[np.int64], split_rows: int
) -> SourceTable:
    """Return the ranges that are not on record of files whose end is."""
    within = found.ranges < counts[found.files]
    have = np.bincount(found.files[within], minlength=len(ends))
    lacking = np.flatnonzero(counts > have)
    order = np.argsort(found.files, kind="stable")
    sorted_files = found.files[order]
    files, ranges, ids = [np.empty(0, np.int64)], [np.empty(0, np.int64)], []
    for file in lacking.tolist():
        first, stop = np.searchsorted(sorted_files, [file, file + 1])
        there = found.ranges[order[first:stop]]
        is_left = np.ones(counts[file], bool)
        is_left[there[there < counts[file]]] = False
        left = np.flatnonzero(is_left)
        files.append(np.full(len(left), file, np.int64))
        ranges.append(left)
        name = ends.id(file).rpartition(_MARK)[0]
        ids += _encoded(range_id(name, number, split_rows) for number in left.tolist())
    at, number = np.concatenate(files), np.concatenate(ranges)
    items = ends.ranges
    assert items is not None
    return SourceTable.of_ranges(
        b"".join(ids),
        np.fromiter(map(len, ids), np.int32, len(ids)),
        ends.fingerprints.take(at),
        RangeItems(items.paths, items.files[at], number),
        None if len(at) else Digests.of(b""),
    )


def _encoded(texts: Iterable[str]) -> list[bytes]:
    return [text.encode("utf-8", "surrogatepass") for text in texts]
