"""The ledger's host without its lease or a disk, and with sources that fail."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from host_run import Run, wait_until
from snapshots import whole_files
from store_files import records_in

from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.messages import Drain, Seal
from ray_resume.core.records import Fingerprint, Record, State
from ray_resume.core.tokens import MODULUS
from ray_resume.errors import CheckpointError, ResumeError
from ray_resume.run.ledger_host import LedgerHost
from ray_resume.run.record_factory import Failed

pytestmark = pytest.mark.long


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run that commits when it is told to."""
    started = Run(tmp_path)
    yield started
    started.end()


def test_nothing_is_committed_once_the_lease_is_lost(tmp_path: Path) -> None:
    run = Run(tmp_path, commit_interval_s=0.05)
    run.apply(Seal(0, 0))
    run.host.flush()
    run.lease.path.unlink()
    run.apply(Seal(1, 0))

    def refused() -> bool:
        try:
            run.apply(Seal(2, 1))
        except CheckpointError as error:
            return "lost" in str(error)
        return False

    wait_until(refused)
    for use in (
        run.host.flush,
        lambda: run.host.fail({3: Failed("boom", counts_toward_quarantine=True)}),
        run.host.close,
    ):
        with pytest.raises(CheckpointError, match="lost"):
            use()
    with pytest.raises(ResumeError):
        run.apply(Seal(3, 0))
    assert set(records_in(run.file)) == {"s0"}
    run.lease.release()


def test_a_full_disk_is_told_to_everybody(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: WriterFile, records: Iterable[Record]) -> None:
        raise CheckpointError("disk full")

    run.apply(Seal(0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(WriterFile, "commit", full)
        with pytest.raises(CheckpointError, match="disk full"):
            run.host.flush()
    # Also when there is space again: what was queued is gone, so nothing must look as if it held.
    for use in (lambda: run.apply(Seal(1, 0)), run.host.flush, run.host.close):
        with pytest.raises(CheckpointError, match="disk full"):
            use()
    assert records_in(run.file) == {}


def test_it_does_not_start_without_its_lease(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.end()
    before = set(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match="has ended"):
        LedgerHost(run.spec)
    assert set(os.listdir(tmp_path)) == before


def test_a_source_fails_until_it_is_quarantined_and_keeps_its_old_files(tmp_path: Path) -> None:
    first = Run(tmp_path, "run0")
    first.apply(Seal(0, 5), Drain(0, MODULUS - 5, rows=1, parts=whole_files("old")))
    first.end()

    def newest() -> Record:
        record = LocalBackend(tmp_path).committed_by_dead_runs("none").snapshot.get("s0")
        assert record is not None
        return record

    assert newest().files == ("old",)
    for turn in (1, 2, 3):
        before = newest()
        run = Run(tmp_path, f"run{turn}", records={0: before}, first_sequence=before.sequence)
        run.host.fail({0: Failed(f"boom {turn}", counts_toward_quarantine=True)})
        run.end()
        record = newest()
        assert record.state is (State.FAILED if turn < 3 else State.QUARANTINED)
        assert (record.failed_runs, record.error) == (turn, f"boom {turn}")
        assert (record.files, record.rows, record.completed_at) == (("old",), 0, None)
        assert (record.run_id, record.fingerprint) == (f"run{turn}", Fingerprint(0, 0))


def test_what_got_lost_alone_is_on_record_at_once_and_not_marked_again(tmp_path: Path) -> None:
    run = Run(tmp_path, max_failed_runs=1)
    run.apply(Seal(0, 0))
    assert run.host.mark_lost(0, "WorkerCrashedError") is None, "it is complete"
    how = run.host.mark_lost(1, "WorkerCrashedError")
    assert how == (
        "rows unaccounted for: a worker died whenever it was executed (WorkerCrashedError)"
    )
    record = run.committed()["s1"]
    assert (record.state, record.failed_runs, record.error) == (State.QUARANTINED, 1, how)
    # What it is marked with is not what the next pass knows of it.
    run.host.begin_pass(2)
    assert run.host.mark_rest_failed() == (3, 1)
    assert run.committed()["s1"] == record
    run.host.flush()
    failed_runs = {name: record.failed_runs for name, record in run.committed().items()}
    assert failed_runs == {"s0": 0, "s1": 1, "s2": 0, "s3": 0}
    run.end()


def test_several_that_fail_at_once_are_not_quarantined(tmp_path: Path) -> None:
    """They went through the same tasks: nobody knows which of them was bad."""
    run = Run(tmp_path, max_failed_runs=1)
    assert (
        run.host.fail(
            {
                1: Failed("boom", counts_toward_quarantine=False),
                2: Failed("boom", counts_toward_quarantine=False),
            }
        )
        == 0
    )
    run.end()
    states = {name: record.state for name, record in records_in(run.file).items()}
    assert states == {"s1": State.FAILED, "s2": State.FAILED}


def test_one_failed_run_may_be_one_too_many(tmp_path: Path) -> None:
    run = Run(tmp_path, max_failed_runs=1)
    run.host.fail({2: Failed("boom", counts_toward_quarantine=True)})
    run.end()
    assert records_in(run.file)["s2"].state is State.QUARANTINED
