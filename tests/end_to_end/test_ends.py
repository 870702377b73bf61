"""The two ends of a pipeline, without Ray: when it seals, and what is there when it drains."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from direct_client import DirectClient
from pyarrow.fs import LocalFileSystem
from ray.data import DataContext
from ray.exceptions import ObjectLostError, RayTaskError

from ray_resume import NonResumableError, ResumeError
from ray_resume.core.filenames import NAME_DIGEST_BYTES
from ray_resume.core.messages import Drain, Event, Failure, ReadFailure, Seal
from ray_resume.core.sources import Source, SourceTable
from ray_resume.core.tokens import MODULUS, token_sum, tokens
from ray_resume.raydata import blocks as batches
from ray_resume.raydata.filereads import Selection
from ray_resume.read.read_task import ResumableReadTask
from ray_resume.run.reader_exception import exception_of
from ray_resume.write.file_sink import FileSink
from ray_resume.write.folder import Folder
from ray_resume.write.formats import FileFormat
from ray_resume.write.layout import Layout

pytestmark = pytest.mark.long


class Listener(DirectClient):
    """Stands in for the connection to a ledger: remembers, and looks around at each message."""

    run_id = "aaaaaaaaaaaa"
    pass_number = 1

    def __init__(self, folder: Path | None = None) -> None:
        self.events: list[Event] = []
        self.folder = folder
        self.seen: dict[str, int] = {}

    def send(self, *events: Event) -> None:
        self.events.extend(events)
        if self.folder is not None:
            self.seen = {path.name: len(pq.read_table(path)) for path in self.folder.iterdir()}

    def agree(self, asked: Sequence[tuple[bytes, int]], *, given: bool = False) -> bytes:
        """Agree with what is asked first."""
        return asked[0][0]


def read_of(*blocks: Any) -> Any:
    def read() -> Iterator[Any]:
        for block in blocks:
            if isinstance(block, Exception):
                raise block
            yield block

    return read


def table(*ids: int) -> pa.Table:
    return pa.table({"id": list(ids)})


def reader(listener: Any, *reads: Any, changed: int = -1) -> ResumableReadTask:
    return ResumableReadTask(
        SourceTable.of(Source(f"source {i}", None) for i in range(len(reads))),
        range(len(reads)),
        lambda _: reads,
        Selection(),
        True,
        lambda source: source.source_id == f"source {changed}",
        listener,
    )


def test_a_source_is_sealed_with_the_sum_of_what_was_read() -> None:
    before = time.time()
    listener = Listener()
    blocks = list(reader(listener, read_of(table(1, 2), table(3)), read_of(), None)())
    sums = [token_sum(batches.split_tracking_columns(block)[2]) for block in blocks]
    sealed = [(0, sum(sums) % MODULUS, 3), (1, 0, 0), (2, 0, 0)]
    assert [event[:3] for event in listener.events] == sealed
    for event in listener.events:
        assert isinstance(event, Seal)
        assert before <= event.began_at <= time.time()


def test_a_source_that_has_changed_is_not_sealed_but_failed() -> None:
    listener = Listener()
    list(reader(listener, read_of(table(1)), read_of(table(2, 3)), changed=1)())
    sealed, failed = listener.events
    assert isinstance(sealed, Seal)
    assert isinstance(failed, Failure)
    assert (failed.source, failed.rows) == (1, 2)
    assert "changed after it was listed" in failed.error


class UnpicklableError(ValueError):
    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def test_a_reader_that_raises_fails_its_source_and_no_other() -> None:
    listener = Listener()
    damaged = OSError("the block is damaged")
    not_found = UnpicklableError(1, 2)
    not_found.__cause__ = KeyError("the cause")

    def raises_at_once() -> Any:
        raise not_found

    reads = [read_of(table(1)), read_of(table(2), table(3), damaged, table(4)), raises_at_once]
    blocks = list(reader(listener, *reads, read_of(table(5)), StopsIteration())())
    assert [block["id"].to_pylist() for block in blocks] == [[1], [2], [3], [5]]
    first, failed, unpicklable, last, stopped = listener.events
    sums = [token_sum(batches.split_tracking_columns(block)[2]) for block in blocks]
    assert isinstance(first, Seal)
    assert isinstance(last, Seal)
    assert (first[:3], last[:3]) == ((0, sums[0], 1), (3, sums[3], 1))
    assert isinstance(failed, ReadFailure)
    assert failed[:3] == (1, (sums[1] + sums[2]) % MODULUS, 2)
    assert failed.error.startswith("OSError: the block is damaged (")
    raised = exception_of(failed.cause, "name it", failed.error)
    assert isinstance(raised, OSError)
    assert isinstance(raised, RayTaskError)
    assert "name it" in str(raised)
    assert "in read\n" in str(raised)
    assert isinstance(unpicklable, ReadFailure)
    assert unpicklable.rows == 0
    assert "1 and 2" in unpicklable.error
    assert "; caused by KeyError: 'the cause'" in unpicklable.error
    assert unpicklable.cause == b""
    raised = exception_of(b"", "name it", unpicklable.error)
    assert isinstance(raised, ResumeError)
    assert "name it" in str(raised)
    assert "1 and 2" in str(raised)
    # That a reader's StopIteration is no end of its rows: it would be sealed, and they be lost.
    assert isinstance(stopped, ReadFailure)


class StopsIteration:
    def __call__(self) -> Any:
        return iter([]).__next__()


def test_of_sources_that_cannot_be_opened_together_only_one_fails() -> None:
    def tasks(sources: SourceTable) -> list[Any]:
        if "source 1" in list(sources.ids()):
            raise OSError("no footer")
        return [read_of(table(int(name[-1]))) for name in sources.ids()]

    listener = Listener()
    blocks = list(replace(reader(listener, None, None, None), tasks=tasks)())
    assert [block["id"].to_pylist() for block in blocks] == [[0], [2]]
    assert [type(event) for event in listener.events] == [Seal, ReadFailure, Seal]

    def refuses(_: SourceTable) -> list[Any]:
        raise NonResumableError("it cannot be bound")

    with pytest.raises(NonResumableError):
        list(replace(reader(listener, None), tasks=refuses)())


def test_an_error_of_the_storage_ends_the_task_after_what_was_read_is_reported() -> None:
    listener = Listener()
    away = OSError("When reading: AWS Error SLOW_DOWN during GetObject")
    for error in (away, ConnectionResetError("reset"), TimeoutError()):
        listener.events.clear()
        with pytest.raises(type(error)):
            list(reader(listener, read_of(table(1)), read_of(error), read_of(table(2)))())
        sealed, failed = listener.events
        assert isinstance(sealed, Seal)
        assert isinstance(failed, ReadFailure)
        assert failed.transient


def test_what_ray_lost_fails_no_source() -> None:
    listener = Listener()
    lost = ObjectLostError("0" * 56, None, "")
    with pytest.raises(ObjectLostError):
        list(reader(listener, read_of(table(1), lost))())
    assert listener.events == []


def test_a_read_is_repeated_as_often_as_tasks_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_resume.raydata.retries._MAX_BACKOFF_S", 0)
    reads: list[int] = []

    def flaky() -> Iterator[Any]:
        reads.append(len(reads))
        yield table(1, 2)
        if len(reads) == 2:
            yield table(3)
        if len(reads) < 3:
            raise ValueError("try again")
        yield table(3, 4)
        yield table(5)

    context = DataContext.get_current().copy()
    context.retried_map_errors, context.max_map_retries = ["again"], 5
    with DataContext.current(context):
        listener = Listener()
        blocks = list(reader(listener, flaky)())
        ids = [block["id"].to_pylist() for block in blocks if block.num_rows]
        assert ids == [[1, 2], [3], [4], [5]]
        total = (
            sum(token_sum(batches.split_tracking_columns(block)[2]) for block in blocks) % MODULUS
        )
        (sealed,) = listener.events
        assert isinstance(sealed, Seal)
        assert sealed[:3] == (0, total, 5)
        # Another order of the rows would make other rows of those that have left.
        reads.clear()
        unsteady = replace(reader(listener, flaky), repeatable=False)
        assert sum(block.num_rows for block in unsteady()) == 2
        assert isinstance(listener.events[-1], ReadFailure)


def test_a_reading_that_is_abandoned_seals_nothing() -> None:
    listener = Listener()
    reading = iter(reader(listener, read_of(table(1), table(2)))())
    next(reading)
    next(reading)
    reading.close()  # type: ignore[attr-defined]
    assert listener.events == []


PARQUET = Layout(FileFormat("parquet"))


def rows_of(sources: list[int]) -> pa.Table:
    n = len(sources)
    return batches.with_tracking_columns(
        pa.table({"id": np.arange(n)}), np.array(sources, np.int32), tokens(5, 0, n)
    )


def sink_into(
    folder: Path, listener: Listener, *, layout: Layout = PARQUET, **options: Any
) -> FileSink:
    here = Folder(LocalFileSystem(), str(folder), str(folder))
    client: Any = listener
    digests = bytes(2 * NAME_DIGEST_BYTES)
    return FileSink(here, layout, "cccccccc-aaaaaaaaaaaa", digests, client, **options)


def test_what_is_drained_is_there_under_its_final_name(tmp_path: Path) -> None:
    listener = Listener(tmp_path)
    block = rows_of([0, 1, 0])
    sink_into(tmp_path, listener).write([block], None)
    drains = [event for event in listener.events if isinstance(event, Drain)]
    assert listener.seen == {part.file: part.file_rows for drain in drains for part in drain.parts}
    assert all(sum(part.rows for part in drain.parts) == drain.rows for drain in drains)
    _, sources, values = batches.split_tracking_columns(block)
    assert {drain.source: drain.delta for drain in drains} == {
        source: -token_sum(values[sources == source]) % MODULUS for source in (0, 1)
    }


@pytest.mark.parametrize(
    ("most_rows", "partition_columns", "file_per_source", "files"),
    [
        (None, (), False, 1),
        (None, (), True, 2),
        (4, (), False, 3),
        (None, ("k",), False, 2),
        (3, ("k",), False, 4),
        (3, ("k",), True, 5),
    ],
)
def test_parts_say_which_rows_of_a_file_are_whose(
    most_rows: int | None,
    partition_columns: tuple[str, ...],
    file_per_source: bool,
    files: int,
    tmp_path: Path,
) -> None:
    sources = [1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1]
    block = rows_of(sources)
    block = block.append_column("k", pa.array([i // 2 % 2 for i in range(12)]))
    layout = Layout(FileFormat("parquet", max_rows=most_rows), partition_columns)
    listener = Listener()
    sink = sink_into(tmp_path, listener, layout=layout, file_per_source=file_per_source)
    sink.write([block.slice(0, 5), block.slice(5)], None)
    (first, second) = listener.events
    assert isinstance(first, Drain)
    assert isinstance(second, Drain)
    found: dict[int, list[int]] = {0: [], 1: []}
    rows: dict[str, list[int]] = {}
    for drain in (first, second):
        assert sum(part.rows for part in drain.parts) == drain.rows
        for name, start, count, whole in drain.parts:
            ids = pq.ParquetFile(tmp_path / name).read().column("id").to_pylist()
            assert len(ids) == whole
            found[drain.source] += ids[start : start + count]
            rows.setdefault(name, []).extend(range(start, start + count))
            assert ids[start : start + count] == sorted(ids[start : start + count])
    assert {source: sorted(ids) for source, ids in found.items()} == {
        source: [i for i, owner in enumerate(sources) if owner == source] for source in (0, 1)
    }
    # Each row of each file is in one part, once.
    assert len(rows) == len(list(tmp_path.rglob("*.parquet"))) == files
    assert all(sorted(places) == list(range(len(places))) for places in rows.values())


def test_a_write_that_fails_drains_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    union = pa.UnionArray.from_dense(
        pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([1])]
    )
    listener = Listener(tmp_path)
    block = batches.with_tracking_columns(
        pa.table({"u": union}), np.zeros(1, np.int32), tokens(5, 0, 1)
    )
    with pytest.raises(pa.ArrowException):
        sink_into(tmp_path, listener).write([block], None)
    assert listener.events == []
    assert list(tmp_path.iterdir()) == []


def test_rows_without_columns_are_refused(tmp_path: Path) -> None:
    listener = Listener(tmp_path)
    block = rows_of([0, 0]).drop_columns(["id"])
    with pytest.raises(ValueError, match="Keep at least one column"):
        sink_into(tmp_path, listener).write([block], None)
    assert listener.events == []
