"""What `lmdb_file` promises, in dictionaries: a model to hold the real one against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from ray_resume.checkpoint.local.lmdb_file import FORMAT_VERSION
from ray_resume.core.digests import source_digest
from ray_resume.core.records import Record, decode, encode, records_of
from ray_resume.errors import CheckpointError


class Writer(Protocol):
    """The one who adds records to a store."""

    def commit(self, records: Sequence[Record]) -> None: ...

    def close(self) -> None: ...


class Newest(Protocol):
    """The newest record of each source over all writers."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Record]: ...

    def get(self, source_id: str) -> Record | None: ...

    def highest_sequence(self) -> int: ...


class Store(Protocol):
    """All writers of one checkpoint, by run id."""

    def create(self, run_id: str, header: Mapping[str, Any]) -> Writer: ...

    def run_ids(self) -> list[str]: ...

    def read(self, run_id: str) -> tuple[dict[str, Any], dict[str, Record]]: ...

    def snapshot(self) -> Newest: ...


class MemoryWriter:
    """A writer whose records last as long as it does."""

    def __init__(self, header: Mapping[str, Any]) -> None:
        self.header = dict(header)
        self.records: dict[bytes, Record] = {}
        self._open = True

    def commit(self, records: Sequence[Record]) -> None:
        if not self._open:
            raise CheckpointError("the writer is closed")
        back = (r for block in encode(records) for r in records_of(decode(block)))
        self.records.update([(source_digest(record.source_id), record) for record in back])

    def close(self) -> None:
        self._open = False


class MemoryUnion:
    """The rule of `Snapshot` in the fewest words: the highest sequence, the lowest run id."""

    def __init__(self, writers: Mapping[str, Mapping[bytes, Record]]) -> None:
        candidates = [
            (-record.sequence, run_id, key, record)
            for run_id, records in writers.items()
            for key, record in records.items()
        ]
        self._newest: dict[bytes, Record] = {}
        for _, _, key, record in sorted(candidates, key=lambda candidate: candidate[:3]):
            self._newest.setdefault(key, record)

    def __len__(self) -> int:
        return len(self._newest)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._newest.values())

    def get(self, source_id: str) -> Record | None:
        return self._newest.get(source_digest(source_id))

    def highest_sequence(self) -> int:
        return max((record.sequence for record in self), default=0)


class MemoryStore:
    """A checkpoint's store without files."""

    def __init__(self) -> None:
        self._writers: dict[str, MemoryWriter] = {}

    def create(self, run_id: str, header: Mapping[str, Any]) -> MemoryWriter:
        writer = MemoryWriter({**header, "run_id": run_id, "format": FORMAT_VERSION})
        self._writers[run_id] = writer
        return writer

    def run_ids(self) -> list[str]:
        return sorted(self._writers)

    def read(self, run_id: str) -> tuple[dict[str, Any], dict[str, Record]]:
        writer = self._writers[run_id]
        return dict(writer.header), {r.source_id: r for r in writer.records.values()}

    def snapshot(self) -> MemoryUnion:
        return MemoryUnion({run_id: writer.records for run_id, writer in self._writers.items()})
