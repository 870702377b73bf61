"""A checkpoint of two runs with its output, to damage and to check."""

from __future__ import annotations

from pathlib import Path

from raw_store import put_record
from snapshots import whole_files

from ray_resume import Checkpoint, CheckReport
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.records import Record, State

RUN, OTHER = "0123456789ab", "ba9876543210"


class Job:
    """A checkpoint with what two runs completed, and their output."""

    def __init__(self, folder: Path, sources: int = 8) -> None:
        self.path, self.out = folder / "ckpt", folder / "out"
        self.out.mkdir()
        self.directory = LocalBackend(self.path)
        self.id = self.directory.ensure()
        self.directory.bind(str(self.out), "")
        half = sources // 2
        first = [self.done(f"s{i}", i + 1, RUN) for i in range(2 * half)]
        self.write(RUN, first)
        # The second run redid half of them, and the end of a run removes what is superseded.
        again = [self.done(f"s{half + i}", 2 * half + 1 + i, OTHER) for i in range(half)]
        self.write(OTHER, again)
        for record in first[half:]:
            (self.out / record.files[0]).unlink()

    def name(self, run_id: str, number: int = 0) -> str:
        return f"{self.id}-{run_id}-{number:016x}-{0:016x}.parquet"

    def done(self, source_id: str, sequence: int, run_id: str) -> Record:
        name = self.name(run_id, sequence)
        (self.out / name).write_bytes(b"rows")
        at = 1.7e9
        return Record(
            source_id,
            State.COMPLETED,
            sequence,
            run_id,
            rows=3,
            parts=whole_files(name),
            completed_at=at,
        )

    def write(self, run_id: str, records: list[Record]) -> None:
        writer = WriterFile.create(self.path, run_id, {"sources_total": 8})
        writer.commit(records)
        writer.close()

    def file(self, run_id: str = RUN) -> Path:
        return self.path / f"{run_id}.mdb"

    def put(self, key: bytes, record: Record) -> None:
        """Write a record past all rules into the first run's file."""
        put_record(self.file(), key, record)

    def check(self) -> CheckReport:
        return Checkpoint(self.path).check()

    def problem(self) -> str:
        """The one problem that there is."""
        report = self.check()
        assert not report.ok
        assert not report
        (problem,) = report.problems
        assert problem in str(report)
        return problem
