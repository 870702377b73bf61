"""The two ends of a pipeline, without Ray: when it seals, and what is there when it drains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.fs import LocalFileSystem

from ray_resume.core.filenames import DIGEST_BYTES
from ray_resume.core.ledger import Drain, Event, Failure, Seal
from ray_resume.core.sources import Selection, Source, SourceTable
from ray_resume.core.tokens import MODULUS, token_sum, tokens
from ray_resume.raydata import blocks as batches
from ray_resume.read.datasource import SourceReader
from ray_resume.write.file_sink import FileSink, Layout
from ray_resume.write.folder import Folder
from ray_resume.write.formats import FORMATS

pytestmark = pytest.mark.long


class Listener:
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


def read_of(*blocks: Any) -> Any:
    def read() -> Iterator[Any]:
        for block in blocks:
            if isinstance(block, Exception):
                raise block
            yield block

    return read


def table(*ids: int) -> pa.Table:
    return pa.table({"id": list(ids)})


def reader(listener: Any, *reads: Any, changed: int = -1) -> SourceReader:
    return SourceReader(
        SourceTable.of(Source(f"source {i}", None) for i in range(len(reads))),
        range(len(reads)),
        lambda _: reads,
        Selection(),
        True,
        lambda source: source.source_id == f"source {changed}",
        listener,
    )


def test_a_source_is_sealed_with_the_sum_of_what_was_read() -> None:
    listener = Listener()
    blocks = list(reader(listener, read_of(table(1, 2), table(3)), read_of(), None)())
    sums = [token_sum(batches.detach(block)[2]) for block in blocks]
    assert listener.events == [Seal(0, sum(sums) % MODULUS, 3), Seal(1, 0, 0), Seal(2, 0, 0)]


def test_a_source_that_has_changed_is_not_sealed_but_failed() -> None:
    listener = Listener()
    list(reader(listener, read_of(table(1)), read_of(table(2, 3)), changed=1)())
    sealed, failed = listener.events
    assert isinstance(sealed, Seal)
    assert isinstance(failed, Failure)
    assert (failed.source, failed.rows) == (1, 2)
    assert "changed after it was listed" in failed.error


def test_a_reader_that_raises_seals_nothing_of_its_source() -> None:
    listener = Listener()
    failing = read_of(table(3), OSError("the disk is gone"))
    with pytest.raises(OSError, match="disk is gone"):
        list(reader(listener, failing)())
    assert listener.events == []


def test_a_reading_that_is_abandoned_seals_nothing() -> None:
    listener = Listener()
    reading = iter(reader(listener, read_of(table(1), table(2)))())
    next(reading)
    next(reading)
    reading.close()  # type: ignore[attr-defined]
    assert listener.events == []


def rows_of(sources: list[int]) -> pa.Table:
    n = len(sources)
    return batches.attach(
        pa.table({"id": np.arange(n)}), np.array(sources, np.int32), tokens(5, 0, n)
    )


def sink_into(folder: Path, listener: Listener) -> FileSink:
    here = Folder(LocalFileSystem(), str(folder), str(folder))
    layout = Layout(FORMATS["parquet"], {})
    client: Any = listener
    return FileSink(here, layout, "cccccccc-aaaaaaaaaaaa", bytes(2 * DIGEST_BYTES), client)


def test_what_is_drained_is_there_under_its_final_name(tmp_path: Path) -> None:
    listener = Listener(tmp_path)
    block = rows_of([0, 1, 0])
    sink_into(tmp_path, listener).write([block], None)
    drains = [event for event in listener.events if isinstance(event, Drain)]
    assert listener.seen == {drain.files[0]: drain.rows for drain in drains}
    _, sources, values = batches.detach(block)
    assert {drain.source: drain.delta for drain in drains} == {
        source: -token_sum(values[sources == source]) % MODULUS for source in (0, 1)
    }


def test_a_write_that_fails_drains_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    union = pa.UnionArray.from_dense(
        pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([1])]
    )
    listener = Listener(tmp_path)
    block = batches.attach(pa.table({"u": union}), np.zeros(1, np.int32), tokens(5, 0, 1))
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
