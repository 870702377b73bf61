"""Readers of a store beside its writer, in its process and in others."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from children import DEADLINE_S, start_python
from store_files import COMMIT_GROUPS, done, records_in

from ray_resume.checkpoint.local import lmdb_file
from ray_resume.checkpoint.local.lmdb_file import WriterFile, writer_files


def test_a_reader_in_another_process_sees_whole_commits(tmp_path: Path) -> None:
    # Few looks: nothing is overwritten, so each finds more to read than the one before.
    size = 50
    writer = start_python(COMMIT_GROUPS, tmp_path, "run", size, "s{k}")
    seen: list[int] = []
    try:
        deadline = time.monotonic() + DEADLINE_S
        assert writer.stdout is not None
        assert writer.stdout.readline() == "1\n"
        while len(seen) < 8 and time.monotonic() < deadline:
            look = records_in(tmp_path / "run.mdb", live=True)
            assert len(look) == size
            (sequence,) = {record.sequence for record in look.values()}
            seen += [sequence] if sequence not in seen else []
    finally:
        writer.kill()
        writer.communicate()
    assert len(seen) == 8
    assert seen == sorted(seen)


COMMIT_WHEN_ASKED = """
import os, sys
from pathlib import Path
from ray_resume.checkpoint.local import lmdb_file as store
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record, State

store._INITIAL_MAP_BYTES = 1 << 16
writer = store.WriterFile.create(Path(sys.argv[1]), "run", {})
for group, _ in enumerate(sys.stdin, 1):
    noise = [os.urandom(500 * group).hex() for _ in range(100)]
    writer.commit([
        Record(f"s{k}", State.COMPLETED, group, "run", parts=(FilePart(noise[k], 0, 1, 1),))
        for k in range(100)
    ])
    print(group, flush=True)
"""


class ObedientWriter:
    """A writer in another process that commits when it is told to, each time more than before."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "run.mdb"
        self._process = start_python(COMMIT_WHEN_ASKED, directory)
        self.commit()

    def commit(self, times: int = 1) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        for _ in range(times):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            assert self._process.stdout.readline()

    def sequences(self) -> set[int]:
        look = records_in(self.path, live=True)
        assert len(look) == 100
        return {record.sequence for record in look.values()}

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def obedient(tmp_path: Path) -> Iterator[ObedientWriter]:
    writer = ObedientWriter(tmp_path)
    yield writer
    writer.kill()


def test_a_look_is_of_one_moment_however_often_its_writer_commits_meanwhile(
    obedient: ObedientWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without LMDB's lock the writer would use the pages again that are being read."""
    header = lmdb_file._header

    def commit_meanwhile(path: Path, text: bytes | None) -> dict[str, Any]:
        obedient.commit(times=5)
        return header(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(lmdb_file, "_header", commit_meanwhile)
        assert obedient.sequences() == {1}
    assert obedient.sequences() == {6}


def test_a_look_at_a_file_that_outgrows_the_readers_map(
    obedient: ObedientWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, really_open = 0, lmdb_file._open

    def open_then_grow(path: Path, **options: bool) -> Any:
        nonlocal opened
        opened += 1
        env = really_open(path, **options)
        if opened == 1:
            obedient.commit(times=5)
        return env

    monkeypatch.setattr(lmdb_file, "_open", open_then_grow)
    assert obedient.sequences() == {6}
    assert opened == 2


def test_a_file_that_grows_while_it_is_looked_at_is_not_taken_for_cut_short(
    obedient: ObedientWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_stat, grown = Path.stat, False

    def stat_then_grow(path: Path, **options: bool) -> os.stat_result:
        nonlocal grown
        result = really_stat(path, **options)
        if not grown:
            grown = True
            obedient.commit(times=5)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", stat_then_grow)
        assert obedient.sequences() == {6}
    assert grown


@pytest.mark.extended
@pytest.mark.long
def test_the_writers_own_process_reads_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening, growing and closing happen under a reader's nose; py-lmdb allows one open file."""
    monkeypatch.setattr(lmdb_file, "_INITIAL_MAP_BYTES", 1 << 16)
    over, looks, faults = threading.Event(), 0, list[BaseException]()

    def look() -> None:
        nonlocal looks
        while not over.is_set():
            try:
                for path in writer_files(tmp_path).values():
                    look = records_in(path, live=True)
                    assert len({record.sequence for record in look.values()}) <= 1
                    looks += 1
            except BaseException as fault:
                faults.append(fault)
                raise

    readers = [threading.Thread(target=look, daemon=True) for _ in range(2)]
    for reader in readers:
        reader.start()

    def write() -> None:
        for run in range(6):
            writer = WriterFile.create(tmp_path, f"run{run}", {})
            for i in range(1, 10):
                writer.commit([done(f"s{k}", i, size=100 * i) for k in range(100)])
            writer.close()
        over.set()

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    writing.join(DEADLINE_S)
    hung = writing.is_alive()
    over.set()
    assert not hung
    for reader in readers:
        reader.join(DEADLINE_S)
    assert not faults
    assert looks > 6
