"""Crashes at named points, for tests of ray_resume and of your own pipelines.

::

    with kill_at("sink.before_drain"):          # a worker dies between its write and its message
        resumable_write(pipeline(), "out/")
    check_exactly_once("ckpt/", expected_rows)

SIGKILL ends the process, once. A process that Ray starts in its place lives. This works on one
host: its processes share files that hold the kills to come. This module does not load Ray.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ray_resume.checkpoint.checkpoint import Checkpoint
from ray_resume.core.filenames import OutputName
from ray_resume.failpoints import POINTS, Fault, Point

__all__ = ["Fault", "Point", "check_exactly_once", "kill_at", "points", "rows_of", "victim_pid"]


def points() -> dict[str, Point]:
    """Return every point at which a process can be killed, by name."""
    return dict(POINTS)


@contextlib.contextmanager
def kill_at(
    point: str, folder: str | os.PathLike[str] | None = None, *, after: int = 0
) -> Iterator[Fault]:
    """Kill a process of a run by SIGKILL when it gets to ``point`` in this block, once.

    Ray runs the work of a dead worker again, so the run goes on. If the ledger dies, the run raises
    ``ResumeError``. The driver is this process: kill it in a script, and give it a ``folder`` that
    :func:`victim_pid` can read afterwards. Blocks for several points can be nested.

    Args:
        point: one of :func:`points`.
        folder: an empty folder on this host for the files of the fault, made if it is missing; by
            default a temporary one, which is removed after the block.
        after: how often processes pass the point, all together, before one dies there.

    Yields:
        The fault. Its ``victim`` is the process id of the process that died, None before that.

    Raises:
        ValueError: there is no such point.
        AssertionError: the block ended well, and no process died there.
    """
    if point not in POINTS:
        raise ValueError(f"there is no point {point!r}; there are {', '.join(POINTS)}")
    if after < 0:
        raise ValueError(f"after must be at least 0, not {after}")
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        Path(folder).mkdir(parents=True, exist_ok=True)
        fault = Fault(point, os.path.abspath(folder), after)
        fault.arm()
        try:
            yield fault
        finally:
            fault.disarm()
        if fault.victim is None:
            raise AssertionError(
                f"No process died at {point}: no {POINTS[point].dies} got there"
                + (f" more than {after} times." if after else ".")
            )


def victim_pid(point: str, folder: str | os.PathLike[str]) -> int | None:
    """Return the process id of the process that died at ``point``; None if none has yet."""
    return Fault(point, os.fspath(folder)).victim


def rows_of(checkpoint: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the rows of a checkpoint's output that count, in a local folder.

    Values are Python objects; those of partition columns are strings. Rows are in the order of the
    files.
    """
    import pyarrow.dataset

    sink = str(Checkpoint(checkpoint).status().sink)
    rows: list[dict[str, Any]] = []
    parts = sorted(Checkpoint(checkpoint).parts(), key=lambda part: (part.file, part.first_row))
    for path, of_file in itertools.groupby(parts, key=lambda part: part.file):
        table = pyarrow.dataset.dataset(path, format=path.rpartition(".")[2]).to_table()
        folders = os.path.relpath(path, sink).split("/")[:-1]
        partition = dict(_pair(folder) for folder in folders)
        for part in of_file:
            live = table.slice(part.first_row, part.rows).to_pylist()
            rows += ({**row, **partition} for row in live)
    return rows


def check_exactly_once(
    checkpoint: str | os.PathLike[str], expected: Iterable[Mapping[str, Any]]
) -> None:
    """Make sure that a finished job's output, in a local folder, has each row exactly once.

    The function also checks that no source is pending, that the checkpoint is sound
    (`Checkpoint.check`), and that it lists each of its files in the folder.

    Args:
        expected: the rows that the output must have, in any order; values must be hashable.

    Raises:
        AssertionError: a check failed. The message names rows that are missing or too many.
    """
    report = Checkpoint(checkpoint).check()
    if not report.ok:
        raise AssertionError(str(report))
    status = Checkpoint(checkpoint).status()
    if status.completed < status.total or status.live:
        raise AssertionError(f"The job is not finished: {status}.")
    there, wanted = _counted(rows_of(checkpoint)), _counted(expected)
    if there != wanted:
        missing, surplus = wanted - there, there - wanted
        raise AssertionError(
            f"{missing.total()} rows are missing and {surplus.total()} too many of "
            f"{wanted.total()}: {_some(missing)} missing, {_some(surplus)} too many."
        )
    left = sorted(_ours(str(status.sink)) - set(Checkpoint(checkpoint).files()))
    if left:
        raise AssertionError(f"{len(left)} files are left over, {left[0]} among them.")


def _pair(folder: str) -> tuple[str, str]:
    name, _, value = folder.partition("=")
    return unquote(name), unquote(value)


def _counted(rows: Iterable[Mapping[str, Any]]) -> Counter[tuple[tuple[str, Any], ...]]:
    return Counter(tuple(sorted(row.items())) for row in rows)


def _some(rows: Counter[tuple[tuple[str, Any], ...]]) -> str:
    return ", ".join(str(dict(row)) for row in list(rows)[:3]) or "none"


def _ours(sink: str) -> set[str]:
    paths = (path for path in Path(sink).rglob("*") if path.is_file())
    return {
        str(path) for path in paths if OutputName.parse(str(path.relative_to(sink))) is not None
    }
