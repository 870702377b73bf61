"""The history of a checkpoint: each run leaves a record, whichever way it ends."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from snapshots import whole_files

from ray_resume import Checkpoint, RunRecord
from ray_resume.checkpoint.backend import CheckpointBackend, LedgerLease, Writer
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.compaction import compact
from ray_resume.checkpoint.history import FOLDER, MOST_RUNS
from ray_resume.checkpoint.local import backend as local_backend
from ray_resume.checkpoint.location import Location
from ray_resume.core.records import Record, State
from ray_resume.errors import CheckpointError

pytestmark = pytest.mark.long

RUN = "00000000000{}"
TTL_S = 2.0


@pytest.fixture(params=["local", "shared"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Location:
    monkeypatch.setattr(local_backend, "_MAX_DEATH_DETECTION_S", 0.1)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    place = Location(str(tmp_path / "ckpt"), shared=request.param == "shared", lease_ttl_s=TTL_S)
    place.open().ensure()
    return place


class Process:
    """A run of a checkpoint as far as its history goes, in this process."""

    def __init__(self, place: Location, number: int, *, committed: int = 0) -> None:
        self.storage: CheckpointBackend = place.open()
        self.run_id = RUN.format(number)
        self.owner = Owner(self.run_id, f"host {number}", 10 + number, time.time())
        claim = Claim([bytes([number]) * 16])
        self.lease: Any = self.storage.acquire(self.owner, claim, wait_s=0)
        self.history = self.storage.history()
        self.started_at = time.time() - 100
        self.history.begin(
            self.run_id,
            {"host": self.owner.host, "pid": 1, "started_at": self.started_at, "sources_total": 9},
        )
        binding = self.storage.bind_ledger(self.run_id, self.lease)
        opened: tuple[LedgerLease, Writer] = binding.open({"sources_total": 9})
        self.joined, self.writer = opened
        if committed:
            self.writer.commit(self._records(committed))

    def _records(self, count: int) -> list[Record]:
        return [
            Record(
                f"{self.run_id} {number}",
                State.COMPLETED if number else State.FAILED,
                number + 1,
                self.run_id,
                rows=10 * number,
                parts=whole_files(f"{self.run_id}-{number}"),
                completed_at=self.started_at + 50 + number,
            )
            for number in range(count)
        ]

    def die(self) -> None:
        """Leave everything as SIGKILL does."""
        self.writer.close()
        self.joined.release()
        self.lease.release()

    def end(self, **facts: Any) -> None:
        self.writer.close()
        self.joined.release()
        self.history.end(self.run_id, {"outcome": "completed", "ended_at": time.time(), **facts})
        self.lease.end(wait_s=0)


def runs(place: Location) -> list[RunRecord]:
    return list(Checkpoint(place.path, shared=place.shared, lease_ttl_s=TTL_S).runs())


def test_a_run_is_on_record_from_its_start_to_its_end(place: Location) -> None:
    assert runs(place) == []
    one = Process(place, 1, committed=3)
    (record,) = runs(place)
    assert (record.outcome, record.ended_at, record.error) == ("running", None, None)
    assert (record.run_id, record.host, record.pid) == (one.run_id, "host 1", 1)
    assert (record.sources_completed, record.sources_failed, record.rows_written) == (2, 1, 30)
    one.history.sign(one.run_id, {"at": time.time(), "rows_read": 77, "rows_at_risk": 5})
    status = Checkpoint(place.path, shared=place.shared, lease_ttl_s=TTL_S).status()
    assert (status.rows_at_risk, status.last_run) == (5, None)
    assert status.sources_per_s is not None
    (record,) = runs(place)
    assert (record.rows_read, record.sources_completed) == (77, 2)
    assert 99 < record.duration_s < 110
    one.end(rows_written=41, error="no reason", stages={"embed": {"rows": 3}})
    (record,) = runs(place)
    assert (record.outcome, record.rows_written, record.error) == ("completed", 41, "no reason")
    assert record.ended_at is not None
    assert record.duration_s == record.ended_at - record.started_at
    assert record.stages == {"embed": {"rows": 3}}


def test_a_killed_run_is_seen_with_its_last_sign_of_life(place: Location) -> None:
    one = Process(place, 1, committed=3)
    two = Process(place, 2)
    two.history.sign(two.run_id, {"at": two.started_at + 7})
    one.die()
    two.die()
    # Another run takes over: it removes what the dead ones had left of their leases.
    Process(place, 3).end(outcome="failed", error="ValueError: bad")
    by_id = {record.run_id: record for record in runs(place)}
    first, second, third = (by_id[RUN.format(number)] for number in (1, 2, 3))
    assert (first.outcome, first.sources_completed, first.rows_written) == ("killed", 2, 30)
    assert first.ended_at == one.started_at + 52
    assert (second.outcome, second.ended_at) == ("killed", two.started_at + 7)
    assert (third.outcome, third.error) == ("failed", "ValueError: bad")


def test_merging_keeps_the_history(place: Location) -> None:
    Process(place, 1, committed=3).die()
    Process(place, 2, committed=2).end(outcome="interrupted")
    before = runs(place)
    storage = place.open()
    wait_s = storage.max_death_detection_s
    assert compact(storage, lease_wait_s=wait_s) == 2
    assert runs(place) == before
    Process(place, 3).end()
    assert [record.outcome for record in runs(place)] == ["killed", "interrupted", "completed"]
    compact(storage, lease_wait_s=wait_s)
    assert [record.outcome for record in runs(place)] == ["killed", "interrupted", "completed"]
    assert storage.history().loose() == 1
    # A run that was taken for dead wakes up: it tells how it ended, and nothing else.
    storage.history().sign(RUN.format(1), {"at": 5.0, "sources_completed": 0})
    assert runs(place)[0] == before[0]
    storage.history().end(RUN.format(1), {"outcome": "failed", "error": "CheckpointError: lost"})
    assert (runs(place)[0].outcome, runs(place)[0].sources_completed) == ("failed", 2)


def test_the_oldest_of_very_many_runs_are_forgotten(place: Location) -> None:
    history = place.open().history()
    records = [
        RunRecord(f"{n:012x}", float(n), n + 1.0, "h", "completed") for n in range(MOST_RUNS + 5)
    ]
    history.merge("0" * 12, records)
    assert [record.started_at for record in runs(place)][:1] == [5.0]
    assert len(runs(place)) == MOST_RUNS


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"null", b'"x"', b'{"a": 1}', b"\xff", b"[" * 100_000, b'{"x": [1]}'],
)
def test_a_damaged_object_hides_no_run(tmp_path: Path, damage: bytes) -> None:
    place = Location(str(tmp_path / "ckpt"))
    place.open().ensure()
    Process(place, 1).end()
    Process(place, 2).end()
    folder = tmp_path / "ckpt" / FOLDER
    for name in (f"{RUN.format(1)}.start", f"{RUN.format(2)}.end", "f" * 12 + ".merged"):
        (folder / name).write_bytes(damage)
    (folder / "notes.txt").write_bytes(damage)
    found = {record.run_id: record.outcome for record in runs(place)}
    assert found[RUN.format(1)] == "completed"
    assert found[RUN.format(2)] == "killed"
    report = Checkpoint(tmp_path / "ckpt").check()
    assert report.ok  # No source depends on it.
    assert ("3 files of the history" in str(report)) == (damage[:1] != b"{" or damage == b"{")


def test_facts_of_another_type_count_as_unknown(tmp_path: Path) -> None:
    place = Location(str(tmp_path / "ckpt"))
    place.open().ensure()
    one = Process(place, 1)
    hostile = {"outcome": "<b>", "ended_at": "now", "host": 5, "error": ["x"], "stages": "y"}
    one.end(**hostile, sources_failed=True, rows_written=1.5, run_id="other", started_at=10**400)
    two = Process(place, 2)
    two.history.sign(two.run_id, {"at": 10**400, "sources_completed": "many"})
    two.history.begin(two.run_id, {"started_at": [], "host": None})
    record, other = runs(place)
    assert (other.outcome, other.started_at, other.sources_completed) == ("running", 0.0, 0)
    assert (record.run_id, record.outcome, record.error, record.stages) == (
        one.run_id,
        "killed",
        None,
        {},
    )
    assert (record.host, record.sources_failed, record.rows_written) == ("unknown", 0, 0)
    json.dumps(record.__dict__)


def test_there_is_no_history_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        Checkpoint(tmp_path / "none").runs()


def test_status_tells_of_files_dead_letters_and_the_last_error(place: Location) -> None:
    storage = place.open()
    out = Path(place.path).parent / "out"
    out.mkdir()
    storage.bind(str(out), "0" * 12)
    checkpoint = Checkpoint(place.path, shared=place.shared, lease_ttl_s=TTL_S)
    done = [
        Record(
            f"s{number}",
            State.COMPLETED,
            number + 1,
            RUN.format(1),
            rows=1,
            parts=whole_files(f"f{number}"),
            dead_rows=number,
            dead_letters=("a.parquet",) * bool(number),
        )
        for number in range(4)
    ]
    one = Process(place, 1)
    one.writer.commit(done)
    one.end(outcome="failed", error="Trace\nValueError: bad")
    for number in range(3):
        (out / f"f{number}").touch()
    status = checkpoint.status()
    assert (status.rows_dead_lettered, status.sources_dead_lettered) == (6, 3)
    assert (status.files_missing, status.complete) == (1, False)
    assert status.last_run is not None
    assert (status.last_run["outcome"], status.last_run["error"]) == (
        "failed",
        "Trace\nValueError: bad",
    )
    json.dumps(dict(status))
    assert {s.source_id: s.rows_dead_lettered for s in checkpoint.sources()}["s3"] == 3
    assert checkpoint.reset(dead_letters=True) == 3
    assert [source.source_id for source in checkpoint.sources()] == ["s0"]
    status = checkpoint.status()
    assert (status.rows_dead_lettered, status.files_missing) == (0, 0)
    # Their letters stay until the next run has completed them.
    assert len(checkpoint.dead_letters()) == 3
    for wrong in ({}, {"state": "all", "dead_letters": True}):
        with pytest.raises(ValueError, match="dead_letters=True"):
            checkpoint.reset(**wrong)  # type: ignore[arg-type]
