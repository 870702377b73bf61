"""Local checkpoints: records written as by a run, and the state of each source."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ray_resume import Checkpoint
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.records import Record


def write(directory: Path, run_id: str, total: int, records: Iterable[Record]) -> None:
    """Write the file of a run that had ``total`` sources."""
    writer = WriterFile.create(directory, run_id, {"sources_total": total})
    writer.commit(list(records))
    writer.close()


def states(path: Path) -> dict[str, str]:
    return {source.source_id: source.state for source in Checkpoint(path).sources()}
