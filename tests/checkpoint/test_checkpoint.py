"""A checkpoint as its user sees it, and `reset`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from local_checkpoint import states, write
from snapshots import whole_files

from ray_resume import Checkpoint, CheckpointError, CheckpointStatus, SourceRecord
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local import backend as directory_module
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.digests import source_digest
from ray_resume.core.records import Fingerprint, Record, State, pipeline_hash

pytestmark = pytest.mark.long

SINK = "/data/out"


def record(source_id: str, state: State, sequence: int, run_id: str, *files: str) -> Record:
    failed = state in (State.FAILED, State.QUARANTINED)
    return Record(
        source_id,
        state,
        sequence,
        run_id,
        rows=0 if failed else 10,
        parts=whole_files(*files),
        error="boom" if failed else None,
        failed_runs=3 if state is State.QUARANTINED else int(failed),
        completed_at=None if failed else 1.7e9,
        fingerprint=Fingerprint(1, 2),
        pipeline=pipeline_hash("s"),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Two runs' work on six sources: a, b and ü done, f failed, q quarantined, one not read."""
    directory = LocalBackend(tmp_path / "ckpt")
    directory.ensure()
    directory.bind(SINK, "")
    first = [
        record("a", State.COMPLETED, 1, "run1", "a1", "a2"),
        record("b", State.COMPLETED, 2, "run1", "b-old"),
        record("f", State.COMPLETED, 3, "run1", "f-old"),
        record("q", State.FAILED, 4, "run1"),
    ]
    second = [
        record("b", State.COMPLETED, 5, "run2", "b-new"),
        record("f", State.FAILED, 6, "run2", "f-old"),
        record("q", State.QUARANTINED, 7, "run2"),
        record("ü\n", State.COMPLETED, 8, "run2"),
    ]
    write(directory.path, "run1", 6, first)
    write(directory.path, "run2", 5, second)
    return directory.path


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "_MAX_DEATH_DETECTION_S", 0.1)


def snapshot(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


# Looking.


def test_status_counts_the_newest_records(path: Path) -> None:
    assert dict(Checkpoint(path).status()) == {
        "total": 6,
        "completed": 3,
        "failed": 1,
        "quarantined": 1,
        "pending": 1,
        "writers": 2,
        "live": 0,
        "sink": SINK,
        "rows": 30,
        "files": 4,
        "unclean": 0,
        "last_completed_at": 1.7e9,
        "errors": {"boom": 2},
        "runs": [],
        "rows_dead_lettered": 0,
        "sources_dead_lettered": 0,
        "files_missing": 3,
        "last_run": None,
        "unsettled": 0,
        "sources_per_s": None,
        "seconds_left": None,
        "rows_at_risk": None,
        "versions": {},
    }


def test_status_is_a_mapping_with_attributes(path: Path) -> None:
    status = Checkpoint(path).status()
    assert isinstance(status, Mapping)
    assert isinstance(status, CheckpointStatus)
    assert json.loads(json.dumps(dict(status))) == dict(status)
    assert {key: getattr(status, key) for key in status} == dict(status)
    assert (len(status), "total" in status, "get" in status) == (23, True, False)
    with pytest.raises(KeyError):
        status["keys"]


def test_status_says_who_is_at_work_and_who_was_killed(path: Path) -> None:
    at_work, gone = Owner("run3", "here", 1, 5.0, "shard 0 of 2"), Owner("run4", "there", 2, 6.0)
    alive = Lease.acquire(path, at_work, Claim(frozenset()), wait_s=0)
    killed = Lease.acquire(path, gone, Claim(frozenset()), wait_s=0)
    killed.release()
    runs = {run["run_id"]: run for run in Checkpoint(path).status().runs}
    assert runs == {
        "run3": {**asdict(at_work), "alive": True},
        "run4": {**asdict(gone), "alive": False},
    }
    alive.end(wait_s=0)
    assert [run["run_id"] for run in Checkpoint(path).status().runs] == ["run4"]


def test_errors_are_counted_by_their_last_line(path: Path) -> None:
    failed = [
        replace(record(f"e{i}", State.FAILED, 20 + i, "run3"), error=f"Traceback\n  {i}\nOh: no\n")
        for i in range(3)
    ]
    others = [
        replace(record(f"o{i}", State.FAILED, 30 + i, "run3"), error=f"other {i}")
        for i in range(12)
    ]
    write(path, "run3", 1, [*others, *failed])
    errors = Checkpoint(path).status().errors
    assert list(errors.items())[:2] == [("Oh: no", 3), ("boom", 2)]
    assert len(errors) == 10


def test_status_before_the_first_run(tmp_path: Path) -> None:
    LocalBackend(tmp_path).ensure()
    status = Checkpoint(tmp_path).status()
    assert (status.total, status.pending, status.writers, status.sink) == (0, 0, 0, None)
    assert list(Checkpoint(tmp_path).sources()) == []
    assert Checkpoint(tmp_path).files() == []


def test_the_total_covers_what_is_on_record(path: Path) -> None:
    write(path, "run3", 1, [record(f"n{i}", State.COMPLETED, 9, "run3") for i in range(5)])
    status = Checkpoint(path).status()
    assert (status.total, status.pending) == (10, 0)


def test_sources_have_public_values(path: Path) -> None:
    by_id = {source.source_id: source for source in Checkpoint(path).sources()}
    files = (f"{SINK}/a1", f"{SINK}/a2")
    assert by_id["a"] == SourceRecord("a", "completed", 10, files, None, 0, "run1", 1.7e9)
    assert by_id["q"] == SourceRecord("q", "quarantined", 0, (), "boom", 3, "run2", None)
    assert by_id["f"].files == (f"{SINK}/f-old",)
    assert set(by_id) == {"a", "b", "f", "q", "ü\n"}


def test_sources_by_state(path: Path) -> None:
    by_state = {
        state: {source.source_id for source in Checkpoint(path).sources(state)}
        for state in ("completed", "failed", "quarantined")
    }
    assert by_state == {"completed": {"a", "b", "ü\n"}, "failed": {"f"}, "quarantined": {"q"}}
    # At the call, not at the first source.
    with pytest.raises(ValueError, match="pending"):
        Checkpoint(path).sources("pending")


def test_files_are_all_that_a_record_that_counts_lists(path: Path) -> None:
    """Also what a failed source carries of an earlier run: it stays until it is replaced."""
    listed = [f"{SINK}/{name}" for name in ("a1", "a2", "b-new", "f-old")]
    assert Checkpoint(path).files() == listed


def test_looking_changes_nothing(path: Path) -> None:
    before = set(os.listdir(path))
    checkpoint = Checkpoint(path)
    checkpoint.status(), list(checkpoint.sources()), checkpoint.files()
    assert set(os.listdir(path)) - before <= {"lock"}


@pytest.mark.parametrize(
    "look",
    [
        Checkpoint.status,
        lambda checkpoint: list(checkpoint.sources()),
        Checkpoint.files,
        lambda checkpoint: checkpoint.reset(state="all"),
    ],
)
def test_a_missing_checkpoint_is_named_and_not_made(
    tmp_path: Path, look: Callable[[Checkpoint], object]
) -> None:
    with pytest.raises(CheckpointError, match=r"There is no checkpoint at .*/none"):
        look(Checkpoint(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_it_is_a_path(path: Path) -> None:
    checkpoint = Checkpoint(str(path) + "/../ckpt/")
    assert isinstance(checkpoint, os.PathLike)
    assert os.fspath(checkpoint) == checkpoint.path == str(path)
    assert Checkpoint(checkpoint).status() == checkpoint.status()
    assert repr(checkpoint) == f"Checkpoint({str(path)!r})"


WITHOUT_RAY = """
import sys, time
from ray_resume import Checkpoint

checkpoint = Checkpoint(sys.argv[1])
print(checkpoint.status().completed, len(list(checkpoint.sources())), len(checkpoint.files()))
print(checkpoint.reset(state="failed"))
print(sorted({"ray", "pyarrow", "pandas"} & set(sys.modules)))
print(time.process_time())
"""


def test_it_works_without_ray_and_starts_at_once(path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_RAY, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    counts, reset, loaded, seconds = result.stdout.splitlines()
    assert (counts, reset, loaded) == ("3 5 4", "1", "['pyarrow']")
    assert float(seconds) < 1.0, "seconds of processor time; importing ray alone takes longer"


def test_a_live_run_is_seen_from_its_own_process(path: Path) -> None:
    claim = Claim(frozenset([source_digest("n")]))
    lease = Lease.acquire(path, Owner.here("run3"), claim, wait_s=0)
    writer = WriterFile.create(path, "run3", {"sources_total": 7})
    for sequence, source_id in enumerate(["n1", "n2"], 9):
        writer.commit([record(source_id, State.COMPLETED, sequence, "run3")])
        status = Checkpoint(path).status()
        assert (status.completed, status.live, status.writers) == (3 + sequence - 8, 1, 3)
        assert status.total == 7
    writer.close()
    lease.end(wait_s=0)
    assert Checkpoint(path).status().live == 0


# Reset.


def test_reset_by_id_forgets_those_alone(path: Path) -> None:
    assert Checkpoint(path).reset(["a", "ü\n"]) == 2
    assert states(path) == {"b": "completed", "f": "failed", "q": "quarantined"}
    status = Checkpoint(path).status()
    assert (status.total, status.pending, status.completed, status.live) == (6, 3, 1, 0)


def test_one_id_is_not_taken_for_its_letters(path: Path) -> None:
    assert Checkpoint(path).reset("ü\n") == 1
    assert "ü\n" not in states(path)


def test_an_id_given_twice_counts_once(path: Path) -> None:
    assert Checkpoint(path).reset(iter(["a", "a"])) == 1


@pytest.mark.parametrize(
    ("state", "left"),
    [
        ("completed", {"f", "q"}),
        ("failed", {"a", "b", "ü\n", "q"}),
        ("quarantined", {"a", "b", "ü\n", "f"}),
        ("all", set()),
    ],
)
def test_reset_by_state(path: Path, state: str, left: set[str]) -> None:
    assert Checkpoint(path).reset(state=state) == 5 - len(left)
    assert set(states(path)) == left
    # There is nothing more in that state: a second time adds nothing.
    before = snapshot(path)
    assert Checkpoint(path).reset(state=state) == 0
    assert snapshot(path) == before


def test_sources_are_counted_and_reset_by_the_version_of_a_udf(tmp_path: Path) -> None:
    directory = LocalBackend(tmp_path)
    directory.ensure()
    signatures = {"run1": ("read -> map(f, version=1)", ["1"]), "run2": ("two", ["1", "2"])}
    of = {"run1": "abcd", "run2": "de", "run3": "f"}
    for number, (run_id, names) in enumerate(of.items()):
        signature, versions = signatures.get(run_id, ("none", None))
        header = {"signature": signature, **({"versions": versions} if versions else {})}
        writer = WriterFile.create(directory.path, run_id, header)
        state = State.COMPLETED
        writer.commit(
            replace(
                record(name, state if name != "c" else State.FAILED, 10 * number, run_id),
                pipeline=pipeline_hash(signature, "code"),
            )
            for name in names
        )
        writer.close()
    checkpoint = Checkpoint(tmp_path)
    # "d" went through the second pipeline since.
    assert checkpoint.status().versions == {"1": 4, "2": 2}
    with pytest.raises(CheckpointError, match=r"'3'. The versions of completed sources: '1', '2'"):
        checkpoint.reset(version="3")
    checkpoint.compact()
    assert checkpoint.reset(version="2") == 2
    assert checkpoint.status().versions == {"1": 2}
    assert checkpoint.reset(version="1") == 3
    assert states(tmp_path) == {"f": "completed"}
    with pytest.raises(CheckpointError, match="of completed sources: none"):
        checkpoint.reset(version="1")


def test_reset_adds_records_and_deletes_nothing(path: Path) -> None:
    before = snapshot(path)
    Checkpoint(path).reset(state="all")
    after = snapshot(path)
    (added,) = (name for name in after.keys() - before.keys() if name != "lock")
    assert added.endswith(".mdb")
    assert {name: after[name] for name in before} == before
    contents = LocalBackend(path).committed_by_dead_runs("other")
    newest = {r.source_id: r for r in contents.snapshot}
    assert {r.state for r in newest.values()} == {State.RESET}
    assert {r.run_id for r in newest.values()} == {added.removesuffix(".mdb")}
    # The highest number was 8, and each record has one of its own.
    assert sorted(r.sequence for r in newest.values()) == list(range(9, 14))
    # Old output stays on record, under the newest name, until new output takes its place.
    files = {source_id: r.files for source_id, r in newest.items() if r.files}
    assert files == {"a": ("a1", "a2"), "b": ("b-new",), "f": ("f-old",)}
    assert {(r.failed_runs, r.error) for r in newest.values()} == {(0, None)}
    # So do its rows: a table has them for good, and the next run warns of that.
    assert {source_id for source_id, r in newest.items() if r.rows} == {"a", "b", "ü\n"}
    assert Checkpoint(path).status().rows == 0


def test_a_source_that_was_reset_can_complete_again_and_be_reset_again(path: Path) -> None:
    for turn in range(3):
        assert Checkpoint(path).reset(["a"]) == 1
        assert "a" not in states(path)
        # Already forgotten is no error: it is on record.
        assert Checkpoint(path).reset(["a"]) == 0
        sequence = (
            LocalBackend(path).committed_by_dead_runs("other").snapshot.highest_sequence() + 1
        )
        run_id = f"again{turn}"
        write(path, run_id, 6, [record("a", State.COMPLETED, sequence, run_id, f"a{turn}")])
        assert states(path)["a"] == "completed"
        assert f"{SINK}/a{turn}" in Checkpoint(path).files()


def test_an_unknown_id_is_named_and_nothing_changes(path: Path) -> None:
    before = snapshot(path)
    with pytest.raises(CheckpointError, match="'zzz' and 1 other") as caught:
        Checkpoint(path).reset(["a", "zzz", "b", "yyy"])
    assert "Nothing was reset" in str(caught.value)
    after = snapshot(path)
    after.pop("lock", None)
    before.pop("lock", None)
    assert after == before
    assert Checkpoint(path).reset(["a"]) == 1


def test_no_ids_reset_nothing(path: Path) -> None:
    assert Checkpoint(path).reset([]) == 0
    assert len(states(path)) == 5


def test_reset_wants_ids_or_a_state(path: Path) -> None:
    checkpoint = Checkpoint(path)
    with pytest.raises(ValueError, match="needs"):
        checkpoint.reset()
    with pytest.raises(ValueError, match="needs"):
        checkpoint.reset(["a"], state="completed")
    for state in ("pending", "reset", ""):
        with pytest.raises(ValueError, match="quarantined or all"):
            checkpoint.reset(state=state)
    assert len(states(path)) == 5


def test_reset_is_refused_while_a_run_lives(path: Path) -> None:
    claim = Claim(frozenset([source_digest("something else")]))
    lease = Lease.acquire(path, Owner.here("run3"), claim, wait_s=0)
    before = set(os.listdir(path))
    with pytest.raises(CheckpointError, match=f"run3.*{os.getpid()}"):
        Checkpoint(path).reset(["a"])
    assert set(os.listdir(path)) == before
    lease.end(wait_s=0)
    assert Checkpoint(path).reset(["a"]) == 1
    # And it does not stand in the way of what comes after it.
    Lease.acquire(path, Owner.here("run4"), Claim(None), wait_s=0).end(wait_s=0)


def test_a_reset_that_cannot_be_written_changes_nothing_and_lets_go(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise CheckpointError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(directory_module, "write_whole", full)
        with pytest.raises(CheckpointError, match="disk full"):
            Checkpoint(path).reset(state="all")
    assert len(states(path)) == 5
    assert Checkpoint(path).status().live == 0
    assert Checkpoint(path).reset(state="all") == 5
