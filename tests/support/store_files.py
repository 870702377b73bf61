"""Files of the real store, what they hold, and a process that commits group by group."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snapshots import whole_files

from ray_resume.checkpoint.local.lmdb_file import WriterFile, read_writer, writer_files
from ray_resume.core.records import Record, State
from ray_resume.core.snapshot import Snapshot


def done(source_id: str, sequence: int = 1, run_id: str = "run", size: int = 0) -> Record:
    """A completed source, its record at least ``size`` bytes long, whatever compresses it."""
    noise = random.Random(f"{source_id} {sequence}").randbytes(size).hex()
    parts = whole_files(noise) if size else ()
    return Record(source_id, State.COMPLETED, sequence, run_id, parts=parts)


def records_in(path: Path, *, live: bool = False) -> dict[str, Record]:
    """What a writer's file holds, by source id."""
    return {record.source_id: record for record in read_writer(path, live=live)[1]}


class LmdbStore:
    """The real store, as the model is spelt."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def create(self, run_id: str, header: Mapping[str, Any]) -> WriterFile:
        return WriterFile.create(self._directory, run_id, header)

    def run_ids(self) -> list[str]:
        return list(writer_files(self._directory))

    def read(self, run_id: str) -> tuple[dict[str, Any], dict[str, Record]]:
        path = writer_files(self._directory)[run_id]
        return read_writer(path, live=False)[0], records_in(path)

    def snapshot(self) -> Snapshot:
        files = writer_files(self._directory).items()
        return Snapshot({run_id: read_writer(path, live=False)[1] for run_id, path in files})


COMMIT_GROUPS = """
import itertools, os, sys
from pathlib import Path
from ray_resume.checkpoint.local import lmdb_file as store
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record, State

directory, run_id, size = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
names = sys.argv[4]
store._INITIAL_MAP_BYTES = 1 << 16
writer = store.WriterFile.create(directory, run_id, {})
for group in itertools.count(1):
    noise = [os.urandom(group * 37 % 1000).hex() for _ in range(size)]
    writer.commit([
        Record(names.format(run_id=run_id, group=group, k=k), State.COMPLETED, group, run_id,
               parts=(FilePart(noise[k], 0, 1, 1),))
        for k in range(size)
    ])
    print(group, flush=True)
"""
