"""The store: one suite for the real one and its model, then files, processes and SIGKILL."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lmdb
import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_store import MemoryStore, MemoryUnion, Store
from raw_store import put_block
from snapshots import snapshot_of, whole_files

from ray_resume.checkpoint.local import lmdb_file
from ray_resume.checkpoint.local.lmdb_file import (
    FORMAT_VERSION,
    WriterFile,
    read_writer,
    writer_files,
)
from ray_resume.core.digests import source_digest
from ray_resume.core.records import Record, State, encode
from ray_resume.core.snapshot import Snapshot
from ray_resume.errors import CheckpointError

DEADLINE_S = 20.0


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


@pytest.fixture(params=["lmdb", "memory"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return LmdbStore(tmp_path) if request.param == "lmdb" else MemoryStore()


# The contract.


def test_what_was_committed_is_read_while_the_writer_is_open_and_after(both: Store) -> None:
    writer = both.create("run", {"sources_total": 2, "note": "ü"})
    header = {"sources_total": 2, "note": "ü", "run_id": "run", "format": FORMAT_VERSION}
    assert both.read("run") == (header, {})
    writer.commit([done("a"), done("b")])
    expected = {"a": done("a"), "b": done("b")}
    assert both.read("run") == (header, expected)
    writer.close()
    assert both.read("run") == (header, expected)


def test_commits_add_up_and_later_ones_supersede(both: Store) -> None:
    writer = both.create("run", {})
    writer.commit([done("a", 1), done("b", 2)])
    writer.commit([])
    writer.commit([done("b", 3), done("c", 4)])
    writer.close()
    assert both.read("run")[1] == {"a": done("a", 1), "b": done("b", 3), "c": done("c", 4)}


def test_a_commit_that_raises_leaves_nothing(both: Store) -> None:
    writer = both.create("run", {})
    with pytest.raises(Exception, match=r"."):
        writer.commit([done("a"), done("b", sequence=2**64)])
    writer.commit([done("c")])
    assert set(both.read("run")[1]) == {"c"}
    writer.close()


def test_a_closed_writer_refuses(both: Store) -> None:
    writer = both.create("run", {})
    writer.close()
    writer.close()
    with pytest.raises(CheckpointError):
        writer.commit([done("a")])
    assert both.read("run")[1] == {}


def test_writers_are_listed_by_run_id(both: Store) -> None:
    assert both.run_ids() == []
    for run_id in ("b", "c", "a"):
        both.create(run_id, {}).close()
    assert both.run_ids() == ["a", "b", "c"]


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_the_union_has_the_highest_sequence_whoever_wrote_first(
    both: Store, order: tuple[str, ...]
) -> None:
    sequences = {"a": {"x": 3, "tie": 5}, "b": {"x": 9, "tie": 5, "y": 1}, "c": {"x": 4}}
    for run_id in order:
        writer = both.create(run_id, {})
        writer.commit([done(s, n, run_id) for s, n in sequences[run_id].items()])
        writer.close()
    snapshot = both.snapshot()
    newest = [done("tie", 5, "a"), done("x", 9, "b"), done("y", 1, "b")]
    assert sorted(snapshot, key=lambda record: record.source_id) == newest
    assert [snapshot.get(r.source_id) for r in newest] == newest
    assert snapshot.get("z") is None
    assert (len(snapshot), snapshot.highest_sequence()) == (3, 9)


def test_the_union_of_nothing(both: Store) -> None:
    snapshot = both.snapshot()
    assert (len(snapshot), snapshot.highest_sequence(), list(snapshot), snapshot.get("a")) == (
        0,
        0,
        [],
        None,
    )


@given(
    st.dictionaries(
        st.sampled_from("abcd"), st.dictionaries(st.sampled_from("xyz"), st.integers(0, 3))
    ),
    st.randoms(use_true_random=False),
)
def test_the_union_agrees_with_its_model(
    sequences: dict[str, dict[str, int]], shuffle: random.Random
) -> None:
    writers = {
        run_id: {source_digest(s): done(s, n, run_id) for s, n in mine.items()}
        for run_id, mine in sequences.items()
    }
    order = list(writers)
    shuffle.shuffle(order)
    snapshot = snapshot_of({run: writers[run].values() for run in order})
    model = MemoryUnion(writers)
    assert {r.source_id: r for r in snapshot} == {r.source_id: r for r in model}
    assert snapshot.highest_sequence() == model.highest_sequence()
    assert len(snapshot) == len(model)


def test_commits_are_synced(tmp_path: Path) -> None:
    """Nothing short of a power cut shows it otherwise."""
    writer = WriterFile.create(tmp_path, "run", {})
    flags = writer._env.flags()
    writer.close()
    assert flags["sync"]
    assert flags["metasync"]
    assert not flags["writemap"]
    assert not flags["map_async"]


# Growth.


@pytest.mark.extended
@pytest.mark.long
def test_one_commit_larger_than_the_whole_map(tmp_path: Path) -> None:
    writer = WriterFile.create(tmp_path, "run", {})
    batch = [done(f"s{i}", size=10_000) for i in range(2_500)]
    assert sum(map(len, encode(batch))) > lmdb_file._INITIAL_MAP_BYTES
    writer.commit([done("before")])
    writer.commit(batch)
    writer.commit([done("after")])
    writer.close()
    assert records_in(tmp_path / "run.mdb").keys() == {"before", "after"} | {
        f"s{i}" for i in range(2_500)
    }


def test_the_map_grows_over_many_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_file, "_INITIAL_MAP_BYTES", 1 << 16)
    writer = WriterFile.create(tmp_path, "run", {})
    for i in range(60):
        writer.commit([done(f"s{i}", size=10_000)])
    writer.close()
    assert len(records_in(tmp_path / "run.mdb")) == 60


@pytest.mark.extended
@pytest.mark.long
def test_small_commits_share_blocks_and_pages(tmp_path: Path) -> None:
    """A run that commits one source at a time is read as quickly as any other."""
    writer = WriterFile.create(tmp_path, "run", {})
    some = [done(f"source {i}", i, size=40) for i in range(1, 1001)]
    for record in some:
        writer.commit([record])
        if record.sequence == 500:
            assert list(records_in(tmp_path / "run.mdb").values()) == some[:500]
    writer.commit(some[:300])
    writer.commit([done("last")])
    writer.close()
    log = read_writer(tmp_path / "run.mdb", live=False)[1]
    assert list(log) == [*some, *some[:300], done("last")]
    assert len(log.blocks) < 10
    # Some pages are free: each commit writes the last block to others.
    assert (tmp_path / "run.mdb").stat().st_size < 40 * 4096 + sum(map(len, log.blocks))


def test_a_commit_that_fails_leaves_the_small_block_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(point: str) -> None:
        if point == "store.in_commit":
            raise OSError("the disk fails")

    writer = WriterFile.create(tmp_path, "run", {})
    writer.commit([done("a")])
    with monkeypatch.context() as patch:
        patch.setattr(lmdb_file, "failpoint", fail)
        with pytest.raises(CheckpointError, match="the disk fails"):
            writer.commit([done("b")])
    assert set(records_in(tmp_path / "run.mdb")) == {"a"}
    writer.commit([done("c")])
    writer.close()
    assert set(records_in(tmp_path / "run.mdb")) == {"a", "c"}


@pytest.mark.parametrize("number", [0, 1])
def test_what_another_process_wrote_into_the_file_is_never_replaced(
    tmp_path: Path, number: int
) -> None:
    writer = WriterFile.create(tmp_path, "run", {})
    writer.commit([done("a")])
    (block,) = encode([done("foreign")])
    with writer._env.begin(db=writer._records, write=True) as transaction:
        transaction.put(number.to_bytes(8, "big"), block)
    with pytest.raises(CheckpointError, match="did not write"):
        writer.commit([done("b")])
    writer.close()
    assert "foreign" in records_in(tmp_path / "run.mdb")


# Files that are not what their name says.


def _garbage(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(100_000))


def _foreign(path: Path) -> None:
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as transaction:
        transaction.put(b"k", b"v")


def _foreign_with_our_names(path: Path) -> None:
    with lmdb.open(str(path), subdir=False, max_dbs=2) as env:
        env.open_db(b"meta"), env.open_db(b"records")


def _cut(path: Path, *, keep: float) -> None:
    writer = WriterFile.create(path.parent, path.stem, {})
    writer.commit([done(f"s{i}", size=200) for i in range(500)])
    writer.close()
    os.truncate(path, int(path.stat().st_size * keep))


def _short_value(path: Path) -> None:
    WriterFile.create(path.parent, path.stem, {}).close()
    put_block(path, b"\x01")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": Path.touch,
    "one byte": lambda path: path.write_bytes(b"x"),
    "garbage": _garbage,
    "zeros": lambda path: path.write_bytes(bytes(50_000)),
    "directory": Path.mkdir,
    "foreign": _foreign,
    "foreign, our names": _foreign_with_our_names,
    "cut in its head": lambda path: _cut(path, keep=0.02),
    "cut in half": lambda path: _cut(path, keep=0.5),
    "cut at its end": lambda path: _cut(path, keep=0.9999),
}


@pytest.mark.parametrize("live", [False, True])
def test_a_file_that_is_no_store_is_one_clear_error(tmp_path: Path, live: bool) -> None:
    paths = {damage: tmp_path / str(number) / "run.mdb" for number, damage in enumerate(DAMAGE)}
    for damage, path in paths.items():
        path.parent.mkdir()
        DAMAGE[damage](path)
    # In a process of its own: reading past the end of a file kills the one that does it.
    reader = run_python(READ, live, *paths.values())
    assert reader.returncode == 0, reader
    told = json.loads(reader.stdout)
    for (damage, path), (kind, message) in zip(paths.items(), told, strict=True):
        assert kind == "CheckpointError", (damage, message)
        assert str(path) in message, damage
        assert "Move it" in message or "restore it" in message, damage


READ = """
import json, sys
from pathlib import Path
from ray_resume.checkpoint.local.lmdb_file import read_writer

told = []
for path in sys.argv[2:]:
    try:
        read_writer(Path(path), live=sys.argv[1] == "True")
        told.append(("nothing", path))
    except Exception as error:
        told.append((type(error).__name__, str(error)))
    print(path, file=sys.stderr)
print(json.dumps(told))
"""


def test_a_value_that_is_no_block_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "run.mdb"
    _short_value(path)
    with pytest.raises(CheckpointError):
        read_writer(path, live=False)


@pytest.mark.parametrize(
    ("version", "way_out"),
    [(FORMAT_VERSION + 1, "pip install -U ray-resume"), (2, "start over with an empty checkpoint")],
)
def test_another_format_is_refused(tmp_path: Path, version: int, way_out: str) -> None:
    path = tmp_path / "run.mdb"
    WriterFile.create(tmp_path, "run", {}).close()
    with lmdb.open(str(path), subdir=False, max_dbs=2) as env:
        meta = env.open_db(b"meta")
        with env.begin(db=meta, write=True) as transaction:
            header = json.loads(transaction.get(b"header") or b"")
            header["format"] = version
            transaction.put(b"header", json.dumps(header).encode())
    with pytest.raises(CheckpointError, match=way_out) as caught:
        read_writer(path, live=False)
    assert str(path) in str(caught.value)
    assert f"format {version}" in str(caught.value)


def test_a_missing_directory_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing/run\.mdb cannot be made"):
        WriterFile.create(tmp_path / "missing", "run", {})


def test_reading_a_dead_run_leaves_the_directory_as_it_was(tmp_path: Path) -> None:
    WriterFile.create(tmp_path, "run", {}).close()
    assert os.listdir(tmp_path) == ["run.mdb"]
    read_writer(tmp_path / "run.mdb", live=False)
    assert os.listdir(tmp_path) == ["run.mdb"]


# Readers beside a writer.


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def start_python(code: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


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


# SIGKILL.


def test_what_was_reported_survives_sigkill_and_groups_are_whole(tmp_path: Path) -> None:
    size, moments = 20, random.Random(1)
    for kill in range(8):
        run_id = f"run{kill}"
        child = start_python(COMMIT_GROUPS, tmp_path, run_id, size, "{run_id} {group} {k}")
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(moments.uniform(0, 0.15))
        child.kill()
        # Not communicate(), which passes over what readline() has read ahead.
        reported = 1 + child.stdout.read().count("\n")
        child.communicate()
        groups: dict[int, int] = {}
        for record in records_in(tmp_path / f"{run_id}.mdb").values():
            groups[record.sequence] = groups.get(record.sequence, 0) + 1
        assert set(groups.values()) == {size}
        # All that was reported is there, and at most the one group that was on its way.
        assert set(groups) in ({*range(1, reported + 1)}, {*range(1, reported + 2)})
    snapshot = LmdbStore(tmp_path).snapshot()
    assert len(snapshot) == sum(len(LmdbStore(tmp_path).read(f"run{k}")[1]) for k in range(8))


KILL_WHILE_CREATING = """
import itertools, os, random, signal, sys, time
from pathlib import Path
from ray_resume.checkpoint.local.lmdb_file import WriterFile, _lmdb

_lmdb()
moments = random.Random(2)
for kill in range(int(sys.argv[2])):
    pid = os.fork()
    if not pid:
        for i in itertools.count():
            WriterFile.create(Path(sys.argv[1]), f"{kill}-{i}", {"k": kill}).close()
    time.sleep(moments.uniform(0.001, 0.03))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


FORKED = """
import ctypes, itertools, os, signal, sys, threading
from pathlib import Path
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record, State

def done(number):
    parts = (FilePart("f" * 3000, 0, 1, 1),)
    return Record(f"s{number}", State.COMPLETED, number + 1, "run", parts=parts)

# A child forked by C would wait for ever if it handed Python's lock to a thread that it has not.
sys.setswitchinterval(60)
writer = WriterFile.create(Path(sys.argv[1]), "run", {})
numbers = itertools.count()
writer.commit([done(next(numbers))])
# Some are forked while a commit is under way.
stop = threading.Event()

def commit():
    while not stop.is_set():
        writer.commit([done(next(numbers)) for _ in range(50)])

thread = threading.Thread(target=commit)
thread.start()
children = []
for fork in [os.fork, ctypes.PyDLL(None).fork] * 4:
    child = fork()
    if child == 0:
        if len(children) >= 4:
            # As a child ends that runs to its end: whoever made it closes what is open.
            sys.exit() if fork is os.fork else ctypes.PyDLL(None).exit(0)
        while True:
            signal.pause()
    children.append(child)
for child in children[4:]:
    os.waitpid(child, 0)
stop.set()
thread.join()
# The map, of 16 MiB, grows under the children.
while (count := next(numbers)) < 8000:
    writer.commit([done(count), *(done(next(numbers)) for _ in range(200))])
print(count, *children[:4], flush=True)
sys.stdin.read()
"""


@pytest.mark.extended
@pytest.mark.long
def test_children_of_the_writers_process_do_its_file_no_harm(tmp_path: Path) -> None:
    """Children that live on, and children that end, forked by Python and by C."""
    writer = start_python(FORKED, tmp_path)
    assert writer.stdout is not None
    assert writer.stdin is not None
    count, *children = map(int, writer.stdout.readline().split())
    try:
        expected = {f"s{number}" for number in range(count)}
        path = tmp_path / "run.mdb"
        assert set(records_in(path, live=True)) == expected
        writer.kill()
        writer.wait()
        # The children are alive, and have the file mapped.
        assert set(records_in(path)) == expected
        assert set(records_in(path, live=True)) == expected
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        writer.kill()
        writer.wait()
        writer.stdin.close()
        writer.stdout.close()


def test_a_file_has_its_name_only_as_a_valid_store(tmp_path: Path) -> None:
    assert run_python(KILL_WHILE_CREATING, tmp_path, 60).returncode == 0
    files = writer_files(tmp_path)
    for run_id, path in files.items():
        header, log = read_writer(path, live=False)
        assert (header["run_id"], list(log)) == (run_id, [])
    # Else no kill came in time to prove anything.
    assert files
    assert any(name.startswith(".") for name in os.listdir(tmp_path))


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    yield
    assert not lmdb_file._own
