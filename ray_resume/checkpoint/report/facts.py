"""`ReportFacts`: all that a report says, in a bounded number of values, however many sources."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.contents import Contents
from ray_resume.checkpoint.history import RunRecord
from ray_resume.checkpoint.output_listing import files_in
from ray_resume.checkpoint.report.failures import (
    MOST_LETTERS,
    Failures,
    failures_of,
    letters_of,
)
from ray_resume.checkpoint.report.timeline import Timeline
from ray_resume.checkpoint.runs import runs_of
from ray_resume.checkpoint.status import CheckpointStatus, status_of
from ray_resume.core.identity import ids_in_headers, size_of
from ray_resume.core.output_files import listed_files
from ray_resume.core.record_log import Flag
from ray_resume.core.records import State
from ray_resume.core.snapshot import Snapshot
from ray_resume.core.stages import StageNumbers
from ray_resume.errors import ResumeError

__all__ = ["Bin", "Crash", "FileSizes", "Point", "ReportFacts", "Sizes", "Slow", "facts_of"]

T = TypeVar("T")

Sizes = Callable[[str], Iterable[tuple[str, int]]]
"""Lists the files in a folder by their relative path, each with its size in bytes."""

MOST_RUNS = 40
"""So many runs have a row each, the newest."""

MOST_SLOW = 20
"""So many sources are called slow."""

_MOST_POINTS = 400
_BINS = 60
_MOST_STAGES = 50
_END_OF_TIME = 1e11
_CRASHES = ("killed", "failed", "interrupted")


@dataclass(frozen=True)
class Point:
    """How many sources and rows were committed at a moment; ``place`` is on the time axis."""

    place: float
    at: float
    sources: int
    rows: int


@dataclass(frozen=True)
class Bin:
    """The sources and rows that runs committed in a second, between two places on the time axis."""

    start: float
    end: float
    at: float
    sources_per_s: float
    rows_per_s: float


@dataclass(frozen=True)
class Crash:
    """A run that did not end by itself.

    Attributes:
        place: where its end is on the time axis.
        rows_lost: rows that it had worked on, of sources that were not committed.
        share_lost: these rows among all that it had worked on.
        wait_s: the seconds until the next run began; None if there was none.
    """

    run: RunRecord
    place: float
    rows_lost: int
    share_lost: float
    wait_s: float | None


@dataclass(frozen=True)
class Slow:
    """A source that took long, from the start of its read until it was complete.

    ``size`` is in bytes. It is None for a row group or a row range: its share of the file is not
    known.
    """

    source_id: str
    seconds: float
    rows: int
    size: int | None


@dataclass(frozen=True)
class FileSizes:
    """Output files by size.

    Attributes:
        bins: from how many bytes to how many, and how many files.
        unknown: listed files whose size is not known: they are gone, or were not looked at.
    """

    count: int
    total: int
    smallest: int
    median: int
    largest: int
    bins: tuple[tuple[int, int, int], ...]
    unknown: int


@dataclass(frozen=True)
class ReportFacts:
    """The facts in a report. Lists are of bounded length.

    Attributes:
        runs: the newest runs, the oldest first; ``run_count``: how many there are in all.
        crashes: the newest crashes likewise; the sums are over all.
        letters: rows in dead letters, of the first files of them.
        letter_files: how many files these are, of how many.
    """

    status: CheckpointStatus
    runs: Sequence[RunRecord]
    run_count: int
    timeline: Timeline
    points: Sequence[Point]
    bins: Sequence[Bin]
    crashes: Sequence[Crash]
    crash_count: int
    rows_lost: int
    share_lost: float
    waited_s: float
    failures: Failures
    letters: Failures
    letter_files: tuple[int, int]
    stages: Sequence[StageNumbers]
    slowest: Sequence[Slow]
    files: FileSizes | None


def facts_of(storage: CheckpointBackend, now: float, sizes: Sizes) -> ReportFacts:
    """Gather the facts; what a live run has committed up to now counts.

    Args:
        sizes: lists a folder that is not on this host.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read.
    """
    status = status_of(storage)
    known = storage.history().read()
    contents = storage.snapshot()
    snapshot = contents.snapshot
    runs = runs_of(storage, known, contents)
    times, rows = _completed(snapshot)
    timeline = Timeline.of(_spans(runs, times, now))
    crashes = list(_crashes(runs, timeline))
    lost = sum(crash.rows_lost for crash in crashes)
    read = sum(run.rows_read for run in runs)
    letters = sorted(snapshot.dead_letters())
    return ReportFacts(
        status=status,
        runs=runs[-MOST_RUNS:],
        run_count=len(runs),
        timeline=timeline,
        points=_points(times, rows, timeline),
        bins=_bins(times, rows, timeline),
        crashes=crashes[-MOST_RUNS:],
        crash_count=len(crashes),
        rows_lost=lost,
        share_lost=lost / max(1, read + lost),
        waited_s=sum(crash.wait_s or 0.0 for crash in crashes),
        failures=failures_of(snapshot),
        letters=letters_of(storage.dead_letters(), letters[:MOST_LETTERS]),
        letter_files=(min(len(letters), MOST_LETTERS), len(letters)),
        stages=_stages(runs),
        slowest=_slowest(runs, contents),
        files=_file_sizes(snapshot, status.sink, storage.root, sizes),
    )


def _completed(snapshot: Snapshot) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return when each completed source was committed, ascending, and its rows."""
    is_end = snapshot.column("flags") & Flag.END != 0
    done = np.flatnonzero(snapshot.in_state(State.COMPLETED) & ~is_end)
    times = snapshot.column("completed_at", done)
    known = (times > 0) & (times < _END_OF_TIME)
    times, rows = times[known], snapshot.column("rows", done)[known]
    order = np.argsort(times, kind="stable")
    return times[order], rows[order]


def _spans(
    runs: Sequence[RunRecord], times: npt.NDArray[np.float64], now: float
) -> Iterator[tuple[float, float]]:
    """Yield when runs were at work. Earlier versions have left commits without a run."""
    first = min((run.started_at for run in runs if run.started_at > 0), default=math.inf)
    for run in runs:
        end = now if run.ended_at is None else run.ended_at
        if 0 < run.started_at <= end < _END_OF_TIME:
            yield run.started_at, end
    before = times[times < first]
    if len(before):
        yield float(before[0]), float(before[-1])
    # A clock that was set back, or the last commit before a kill.
    if len(times) and runs:
        yield float(times[-1]), float(times[-1])


def _points(
    times: npt.NDArray[np.float64], rows: npt.NDArray[np.int64], timeline: Timeline
) -> list[Point]:
    """Return the progress, at so many moments that a line through them looks the same."""
    if not timeline:
        return []
    sums = np.cumsum(rows.astype(np.float64))
    chosen = np.unique(np.linspace(0, len(times) - 1, min(len(times), _MOST_POINTS)).astype(int))
    if len(times):
        # The ends of pauses: a line must not rise in them.
        gaps = np.diff(times)
        longest = np.argsort(gaps)[-_MOST_POINTS // 4 :]
        chosen = np.unique(np.concatenate([chosen, longest, longest + 1 if len(gaps) else longest]))
    places = timeline.place(times[chosen])
    begun = Point(0.0, float(timeline.starts[0]), 0, 0)
    points = [
        Point(round(place, 5), at, number + 1, int(done))
        for place, at, number, done in zip(
            places.tolist(), times[chosen].tolist(), chosen.tolist(), sums[chosen], strict=True
        )
    ]
    last = points[-1] if points else begun
    end = Point(round(timeline.length, 5), float(timeline.ends[-1]), last.sources, last.rows)
    return [begun, *points, end]


def _bins(
    times: npt.NDArray[np.float64], rows: npt.NDArray[np.int64], timeline: Timeline
) -> list[Bin]:
    """Return the throughput over time."""
    if not timeline or not len(times):
        return []
    edges = np.linspace(0, timeline.length, _BINS + 1)
    places = np.clip(timeline.place(times), 0, timeline.length)
    sources, _ = np.histogram(places, edges)
    of_rows, _ = np.histogram(places, edges, weights=rows.astype(np.float64))
    seconds = timeline.length / _BINS * timeline.unit_s
    moments = timeline.moment(edges[:-1]).tolist()
    return [
        Bin(round(start, 5), round(end, 5), at, one / seconds, other / seconds)
        for (start, end), at, one, other in zip(
            itertools.pairwise(edges.tolist()),
            moments,
            sources.tolist(),
            of_rows.tolist(),
            strict=True,
        )
    ]


def _crashes(runs: Sequence[RunRecord], timeline: Timeline) -> Iterator[Crash]:
    starts = np.sort(np.array([run.started_at for run in runs], np.float64))
    for run in runs:
        if run.outcome not in _CRASHES or run.ended_at is None:
            continue
        later = int(np.searchsorted(starts, max(run.ended_at, run.started_at), "right"))
        wait_s = float(starts[later] - run.ended_at) if later < len(starts) else None
        lost, done = max(0, run.rows_at_risk), max(0, run.rows_read)
        place = float(timeline.place(np.array([run.ended_at]))[0]) if timeline else 0.0
        # The rows of completed sources that were not yet committed count as read.
        share = lost / max(1, done, lost)
        yield Crash(run, round(place, 5), lost, share, wait_s)


def _stages(runs: Iterable[RunRecord]) -> list[StageNumbers]:
    """Add up the numbers of each stage over the runs that have recorded any."""
    sums: dict[str, StageNumbers] = {}
    for run in runs:
        for name, numbers in run.stages.items():
            if isinstance(numbers, Mapping) and (name in sums or len(sums) < _MOST_STAGES):
                sums[name] = _plus(sums.get(name, StageNumbers(name)), numbers)
    return list(sums.values())


def _plus(known: StageNumbers, numbers: Mapping[str, Any]) -> StageNumbers:
    def count(what: str) -> int:
        return int(_number(numbers.get(what)))

    return StageNumbers(
        known.name,
        rows_in=known.rows_in + count("rows_in"),
        rows_out=known.rows_out + count("rows_out"),
        rows_failed=known.rows_failed + count("rows_failed"),
        rows_dead_lettered=known.rows_dead_lettered + count("rows_dead_lettered"),
        calls=known.calls + count("calls"),
        batches=known.batches + count("batches"),
        udf_s=known.udf_s + _number(numbers.get("udf_s")),
    )


def _number(value: Any) -> float:
    """Return a number of the history, which may hold anything."""
    is_number = type(value) in (int, float) and 0 <= value < 1e18
    return value if is_number else 0


def _slowest(runs: Iterable[RunRecord], contents: Contents) -> list[Slow]:
    seconds: dict[str, float] = {}
    for run in runs:
        for source_id, took in run.slowest.items():
            seconds[source_id] = _number(took)
    chosen = sorted(seconds.items(), key=lambda one: (-one[1], one[0]))
    return list(itertools.islice(_known(chosen, contents), MOST_SLOW))


def _known(chosen: Iterable[tuple[str, float]], contents: Contents) -> Iterator[Slow]:
    snapshot, headers = contents.snapshot, contents.headers
    for source_id, took in chosen:
        record = snapshot.get(source_id)
        if record is not None and record.state is State.COMPLETED:
            ways = ids_in_headers(headers, [record.run_id])
            size = size_of(ways, source_id, record.fingerprint.size)
            yield Slow(source_id, took, record.rows, size)


def _file_sizes(snapshot: Snapshot, sink: str | None, root: str, sizes: Sizes) -> FileSizes | None:
    """Return the sizes of the listed files; None if there are none, or they cannot be seen."""
    listed = listed_files(snapshot)
    if sink is None or not len(listed):
        return None
    names = frozenset(listed)
    try:
        local = os.path.isabs(sink)
        there = files_in(sink, apart_from=root) if local else sizes(sink)
        found = np.array([size for name, size in there if name in names], np.int64)
    except (OSError, ResumeError):
        return None
    if not len(found):
        return FileSizes(0, 0, 0, 0, 0, (), len(names))
    # From each power of two to the next.
    powers = np.floor(np.log2(np.maximum(found, 1))).astype(int)
    values, counts = np.unique(powers, return_counts=True)
    by_power = dict(zip(values.tolist(), counts.tolist(), strict=True))
    bins = tuple(
        (2**p, 2 ** (p + 1), by_power.get(p, 0)) for p in range(min(by_power), max(by_power) + 1)
    )
    return FileSizes(
        len(found),
        int(found.sum()),
        int(found.min()),
        int(np.median(found)),
        int(found.max()),
        bins,
        len(names) - len(found),
    )
