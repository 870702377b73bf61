"""Checkpoints for the commands: of two runs, of a file that sources share, with dead letters."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from local_checkpoint import write
from snapshots import whole_files

from ray_resume.checkpoint.local import backend as directory_module
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record, State

RUN = "0123456789ab"


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "_MAX_DEATH_DETECTION_S", 0.1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Make the checkpoint of two runs: two done, two failed, one given up, one of six not read."""
    out = tmp_path / "out"
    out.mkdir()
    directory = LocalBackend(tmp_path / "ckpt")
    directory.ensure()
    directory.bind(str(out), "")
    now = time.time()
    done = [
        Record(
            name,
            State.COMPLETED,
            n,
            "run1",
            10,
            whole_files(f"{name}.parquet"),
            completed_at=now - 7200,
        )
        for n, name in enumerate("ab", 1)
    ]
    for record in done:
        (out / record.files[0]).write_bytes(b"rows")
    failed = [
        Record(name, State.FAILED, n, "run2", error=f"Trace\n {n}\nValueError: bad", failed_runs=1)
        for n, name in enumerate(["f\n1", "f2"], 3)
    ]
    given_up = Record("q", State.QUARANTINED, 5, "run2", error="\x1b[31mboom", failed_runs=3)
    write(directory.path, "run1", 6, done)
    write(directory.path, "run2", 6, [*failed, given_up])
    return directory.path


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Make the output of a killed run: a file with rows of two sources, and a row of a third."""
    directory = LocalBackend(tmp_path / "ckpt")
    name = f"{directory.ensure()}-{RUN}-{0:016x}-{1:016x}.parquet"
    (tmp_path / "out").mkdir()
    directory.bind(str(tmp_path / "out"), "")
    pq.write_table(pa.table({"id": range(4)}), tmp_path / "out" / name)
    parts = {"a": FilePart(name, 0, 2, 4), "b\nb": FilePart(name, 3, 1, 4)}
    records = [
        Record(source, State.COMPLETED, n, RUN, part.rows, (part,), completed_at=1.7e9)
        for n, (source, part) in enumerate(parts.items(), 1)
    ]
    write(directory.path, RUN, 3, records)
    return directory.path


@pytest.fixture
def dead(path: Path) -> Path:
    """Make a checkpoint of two runs that are done, with rows in dead letters."""
    directory = LocalBackend(path)
    writer = WriterFile.create(path, "run3", {"sources_total": 6})
    letters = {"f\n1": (1, ("l1",)), "x": (1234, ("l2", "l3"))}
    writer.commit(
        Record(
            name,
            State.COMPLETED,
            n,
            "run3",
            1,
            whole_files("a.parquet"),
            completed_at=time.time(),
            dead_rows=letters.get(name, (0, ()))[0],
            dead_letters=letters.get(name, (0, ()))[1],
        )
        for n, name in enumerate(["f\n1", "f2", "q", "x"], 9)
    )
    writer.close()
    history = directory.history()
    now = time.time()
    start = {"host": "h\x1b1", "pid": 7, "sources_total": 6}
    history.begin("run2", {**start, "started_at": now - 7300})
    history.begin("run3", {**start, "started_at": now - 90, "shard": "shard 1 of 2"})
    failed = {"outcome": "failed", "error": "Trace\nValueError: b\x1bad", "rows_written": 1234567}
    history.end("run3", {**failed, "ended_at": now - 30, "sources_completed": 4})
    return path


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before: Any = signal.getsignal(signal.SIGPIPE)
    yield
    assert signal.getsignal(signal.SIGPIPE) == before
