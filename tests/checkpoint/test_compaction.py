"""`compact`: fewer files that say the same, whenever it is killed."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ids_in, write_file
from hypothesis import given
from hypothesis import strategies as st
from raw_store import put_block
from snapshots import snapshot_of, whole_files

from ray_resume import Checkpoint, CheckpointError
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local import backend as directory_module
from ray_resume.checkpoint.local import lmdb_file
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.local.lmdb_file import WriterFile, read_writer
from ray_resume.core.digests import source_digest
from ray_resume.core.records import Record, State, encode

pytestmark = [pytest.mark.extended, pytest.mark.long]

DEADLINE_S = 30.0


def done(source_id: str, sequence: int, run_id: str) -> Record:
    parts = whole_files(f"{source_id}-{sequence}")
    return Record(source_id, State.COMPLETED, sequence, run_id, rows=sequence, parts=parts)


def fill(path: Path, runs: int, sources: int = 20) -> LocalBackend:
    """Each run completes a few sources of its own, and supersedes some of the one before."""
    directory = LocalBackend(path)
    directory.ensure()
    directory.bind("/data/out", "")
    sequence = 0
    for run in range(runs):
        run_id = f"run{run:02d}"
        writer = WriterFile.create(path, run_id, {"sources_total": 1000 + run, "n": run})
        ids = range(run * sources - sources // 4, (run + 1) * sources)
        records = []
        for number in ids:
            sequence += 1
            records.append(done(f"s{number}", sequence, run_id))
        writer.commit(records)
        writer.close()
    return directory


def truth(path: Path) -> dict[str, Any]:
    """All that a run or a person can learn from a checkpoint, but how many files it takes."""
    contents = LocalBackend(path).committed_by_dead_runs("other")
    status = dict(Checkpoint(path).status())
    del status["writers"], status["runs"]
    return {
        "records": {record.source_id: record for record in contents.snapshot},
        "sequence": contents.snapshot.highest_sequence(),
        "runs": {run for run, h in contents.headers.items() if h.get("purpose") != "compact"},
        "dead": {run for run in contents.dead_runs if run.startswith("run")},
        "headers": {run: h for run, h in contents.headers.items() if run.startswith("run")},
        "status": status,
    }


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "_MAX_DEATH_DETECTION_S", 0.1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return fill(tmp_path / "ckpt", runs=7).path


def names(path: Path) -> set[str]:
    return {
        name for name in os.listdir(path) if name not in ("lock", "checkpoint.json", "sink.json")
    }


def test_many_files_become_one_that_says_the_same(path: Path) -> None:
    before = truth(path)
    assert Checkpoint(path).compact() == 7
    assert truth(path) == before
    assert Checkpoint(path).status().writers == 1
    (name,) = names(path)
    assert name.endswith(".mdb")


def test_one_file_is_left_alone(path: Path) -> None:
    Checkpoint(path).compact()
    before = {name: (path / name).read_bytes() for name in names(path)}
    assert Checkpoint(path).compact() == 0
    assert {name: (path / name).read_bytes() for name in names(path)} == before


def test_an_empty_checkpoint(tmp_path: Path) -> None:
    LocalBackend(tmp_path).ensure()
    assert Checkpoint(tmp_path).compact() == 0


def test_a_missing_checkpoint_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        Checkpoint(tmp_path / "none").compact()
    assert os.listdir(tmp_path) == []


def test_again_after_more_runs_and_resets(path: Path) -> None:
    """What earlier compactions knew is handed on."""
    Checkpoint(path).compact()
    Checkpoint(path).reset(["s1", "s2"])
    writer = WriterFile.create(path, "run99", {"sources_total": 3})
    sequence = LocalBackend(path).committed_by_dead_runs("x").snapshot.highest_sequence() + 1
    writer.commit([done("s1", sequence, "run99")])
    writer.close()
    before = truth(path)
    assert Checkpoint(path).compact() == 3
    assert truth(path) == before
    headers = LocalBackend(path).committed_by_dead_runs("x").headers.values()
    assert [header.get("purpose") for header in headers].count("compact") == 1
    assert before["status"]["total"] == 1006
    assert {f"run{run:02d}" for run in range(7)} | {"run99"} <= before["dead"]
    assert Checkpoint(path).reset(state="all") > 100


def test_what_killed_processes_left_half_made_is_removed(path: Path) -> None:
    run = "0123456789ab"
    for name in (f".{run}.mdb.new", f".{run}.mdb.new-lock", f"{run}.mdb-lock"):
        (path / name).write_bytes(b"x")
    others = {".x.mdb.new", "other.mdb-lock", "dhcp.lease", "notes.txt"}
    for name in others:
        (path / name).write_bytes(b"somebody else's")
    Checkpoint(path).compact()
    assert others < names(path)
    assert len(names(path) - others) == 1


def test_it_is_refused_while_a_run_is_at_work(path: Path) -> None:
    claim = Claim(frozenset([source_digest("something")]))
    lease = Lease.acquire(path, Owner.here("run50"), claim, wait_s=0)
    before = names(path)
    with pytest.raises(CheckpointError, match=f"run50.*{os.getpid()}"):
        Checkpoint(path).compact()
    assert names(path) == before
    lease.end(wait_s=0)
    assert Checkpoint(path).compact() == 7


def test_no_run_starts_meanwhile(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    really_write = lmdb_file.write_whole

    def start_a_run(*args: Any) -> Path:
        with pytest.raises(CheckpointError, match="in use"):
            Lease.acquire(path, Owner.here("run60"), Claim(frozenset()), wait_s=0)
        tried.append(True)
        return really_write(*args)

    monkeypatch.setattr("ray_resume.checkpoint.local.backend.write_whole", start_a_run)
    assert Checkpoint(path).compact() == 7
    assert tried == [True]


def test_what_cannot_be_read_back_replaces_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where no record was in any file: their headers say which runs there were."""
    for file in path.glob("*.mdb"):
        file.unlink()
    for run_id in ("run98", "run99"):
        lmdb_file.WriterFile.create(path, run_id, {}).close()
    really_write = lmdb_file.write_whole

    def spoil(*args: Any) -> Path:
        made = really_write(*args)
        made.write_bytes(b"x" * 100_000)
        return made

    before = names(path)
    with monkeypatch.context() as patch:
        patch.setattr("ray_resume.checkpoint.local.backend.write_whole", spoil)
        with pytest.raises(CheckpointError, match="did not come back as it was written"):
            Checkpoint(path).compact()
    assert names(path) == before
    assert Checkpoint(path).compact() == 2


def test_a_damaged_file_stops_it(path: Path) -> None:
    (path / "run03.mdb").write_bytes(b"x" * 100_000)
    before = names(path)
    with pytest.raises(CheckpointError, match=r"run03\.mdb"):
        Checkpoint(path).compact()
    assert names(path) == before


def test_a_block_that_cannot_be_read_stops_it(path: Path) -> None:
    put_block(path / "run03.mdb", next(encode([done("s1", 9999, "run03")]))[:-3])
    before = names(path)
    with pytest.raises(CheckpointError, match=r"run03\.mdb.*restore it"):
        Checkpoint(path).compact()
    assert names(path) - before <= {"run03.mdb-lock"}
    assert before - names(path) <= {"run03.mdb-lock"}


def test_a_full_disk_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, known = names(path), truth(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        with pytest.raises(CheckpointError, match="No space left"):
            Checkpoint(path).compact()
    assert names(path) == before
    assert truth(path) == known


def test_looking_never_sees_less(path: Path) -> None:
    """Files are merged and removed under a reader's nose, and it counts the same every time."""
    expected = Checkpoint(path).status().completed
    over, looks, faults = threading.Event(), [0], list[BaseException]()

    def look() -> None:
        while not over.is_set():
            try:
                assert Checkpoint(path).status().completed == expected
                looks[0] += 1
            except BaseException as fault:
                faults.append(fault)
                return

    reader = threading.Thread(target=look, daemon=True)
    reader.start()
    began, turn = time.monotonic(), 0
    while turn < 5 or (looks[0] < 4 and not faults and time.monotonic() - began < DEADLINE_S):
        # An empty run each, so that there is something to merge.
        for extra in range(3):
            WriterFile.create(path, f"run8{turn:03}{extra}", {}).close()
        Checkpoint(path).compact()
        turn += 1
    over.set()
    reader.join(DEADLINE_S)
    assert not faults
    assert looks[0] >= 4


@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.dictionaries(st.sampled_from("xyz"), st.integers(0, 2)),
        min_size=1,
    ),
    st.sampled_from(["0", "b5", "z"]),
    st.data(),
)
def test_any_rest_of_the_old_files_beside_the_merged_one_says_the_same(
    sequences: dict[str, dict[str, int]], merged_id: str, data: st.DataObject
) -> None:
    """Also on ties, and whatever the merged file is called: what a crash leaves is harmless."""
    writers = {run: [done(s, n, run) for s, n in mine.items()] for run, mine in sequences.items()}
    whole = {record.source_id: record for record in snapshot_of(writers)}
    rest = data.draw(st.sets(st.sampled_from(sorted(writers))))
    left = {run: writers[run] for run in rest}
    both = snapshot_of({merged_id: whole.values(), **left})
    assert {record.source_id: record for record in both} == whole


# SIGKILL.

KILL_AT = """
import os, signal, sys
from pathlib import Path
from ray_resume import Checkpoint

point, count = sys.argv[2], int(sys.argv[3])
calls = 0

def dies(really):
    def call(*args, **options):
        global calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return really(*args, **options)
    return call

home, name = {
    "rename": (os, "rename"),
    "fsync": (os, "fsync"),
    "unlink": (Path, "unlink"),
}[point]
checkpoint = Checkpoint(sys.argv[1])
setattr(home, name, dies(getattr(home, name)))
checkpoint.compact()
"""


@pytest.mark.parametrize(
    ("point", "count"),
    [("rename", 1), ("fsync", 1), *(("unlink", count) for count in range(1, 10))],
)
def test_killed_at_a_named_point_it_loses_nothing(path: Path, point: str, count: int) -> None:
    before = truth(path)
    command = [sys.executable, "-c", KILL_AT, str(path), point, str(count)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL, killed
    assert truth(path) == before
    assert Checkpoint(path).compact() > 1 or len(names(path)) == 1
    assert truth(path) == before
    assert len(names(path)) == 1


KILL_AT_RANDOM = """
import os, random, signal, sys, time
from ray_resume import Checkpoint
from ray_resume.checkpoint import compaction
from ray_resume.checkpoint.local import lmdb_file, reader

lmdb_file._lmdb()
checkpoint, seed = Checkpoint(sys.argv[1]), int(sys.argv[2])
started = time.monotonic()
pid = os.fork()
if not pid:
    checkpoint.compact()
    os._exit(0)
time.sleep(random.Random(seed).uniform(0, float(sys.argv[3])))
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
"""


def _kill_at_random(tmp_path: Path, kills: int) -> None:
    path = fill(tmp_path / "ckpt", runs=12, sources=60).path
    before = truth(path)
    took_s = _duration(tmp_path)
    extra = itertools.count()
    stages: set[int] = set()
    # Too few stages, and no kill came at a moment that proves anything: a busy machine needs more.
    for kill in itertools.takewhile(lambda k: k < kills or len(stages) <= 2, range(5 * kills)):
        subprocess.run(
            [sys.executable, "-c", KILL_AT_RANDOM, str(path), str(kill), str(took_s * 1.1)],
            timeout=60,
            check=True,
        )
        stages.add(len([name for name in names(path) if name.endswith(".mdb")]))
        assert truth(path)["records"] == before["records"]
        assert truth(path)["headers"].items() >= before["headers"].items()
        for _ in range(4):
            WriterFile.create(path, f"run8{next(extra):04d}", {}).close()
    Checkpoint(path).compact()
    assert truth(path)["records"] == before["records"]
    assert len(stages) > 2


def _duration(tmp_path: Path) -> float:
    path = fill(tmp_path / "timed", runs=12, sources=60).path
    started = time.monotonic()
    Checkpoint(path).compact()
    return time.monotonic() - started


def test_killed_at_random_it_loses_nothing(tmp_path: Path) -> None:
    _kill_at_random(tmp_path, kills=8)


@pytest.mark.slow
def test_killed_at_random_a_hundred_times_it_loses_nothing(tmp_path: Path) -> None:
    _kill_at_random(tmp_path, kills=100)


def test_the_merged_file_is_dense(tmp_path: Path) -> None:
    path = fill(tmp_path / "ckpt", runs=20).path
    size = sum(file.stat().st_size for file in path.glob("*.mdb"))
    Checkpoint(path).compact()
    (merged,) = path.glob("*.mdb")
    assert merged.stat().st_size < size / 4
    assert len(read_writer(merged, live=False)[1]) == 20 * 20 + 5


def test_a_job_goes_on_from_a_merged_checkpoint(cluster: str, source: Path, tmp_path: Path) -> None:
    """Runs before and after it, left-overs of a run that is but a name in the merged file."""
    import ray

    from ray_resume import resumable_read, resumable_write

    checkpoint, out = tmp_path / "ckpt", tmp_path / "result"

    def run() -> tuple[int, int]:
        ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=checkpoint)
        summary = resumable_write(ds, out)
        return summary.sources_skipped, summary.sources_completed

    assert run() == (0, 7)
    write_file(source / "more.parquet", 600, 700)
    assert run() == (7, 1)
    assert Checkpoint(checkpoint).compact() == 2
    listed = Checkpoint(checkpoint).files()
    stem = listed[0].removesuffix(".parquet")
    left_over = Path(f"{stem[:-16]}{0:016x}.parquet")
    left_over.write_bytes(b"of a run that crashed")
    Checkpoint(checkpoint).reset([str(source / "00001.parquet")])
    assert run() == (7, 1)
    assert not left_over.exists()
    assert ids_in(out) == list(range(700))
    report = Checkpoint(checkpoint).check()
    assert (report.ok, report.notes) == (True, ())
