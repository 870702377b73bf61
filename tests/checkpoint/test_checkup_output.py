"""`check` of output files: those that are gone, left over, or listed twice; and beside a run."""

from __future__ import annotations

import fcntl
from dataclasses import replace
from pathlib import Path

import pytest
from checked_job import OTHER, RUN, Job

from ray_resume import Checkpoint, CheckReport
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local import lease as lease_module
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.digests import source_digest
from ray_resume.core.parts import FilePart

pytestmark = pytest.mark.long


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_listed_file_that_is_gone(job: Job) -> None:
    (job.out / job.name(OTHER, 9)).unlink()
    problem = job.problem()
    assert job.name(OTHER, 9) in problem
    assert f"Checkpoint({str(job.path)!r}).reset(['s4'])" in problem


def test_a_listed_file_that_is_empty(job: Job) -> None:
    (job.out / job.name(OTHER, 9)).write_bytes(b"")
    assert "or empty (1)" in job.problem()


def test_the_whole_output_is_gone(job: Job) -> None:
    for path in job.out.iterdir():
        path.unlink()
    job.out.rmdir()
    assert "8 output files of 8 completed sources are gone" in job.problem()


def test_the_earlier_file_of_a_source_that_was_reset_is_no_loss(job: Job) -> None:
    Checkpoint(job.path).reset(["s4"])
    (job.out / job.name(OTHER, 9)).unlink()
    report = job.check()
    assert report.ok
    assert "1 earlier output files" in report.notes[0]


def test_a_file_of_several_sources_is_missed_by_those_that_are_completed(job: Job) -> None:
    shared = job.name("aaaaaaaaaaaa", 1)
    (job.out / shared).write_bytes(b"rows")
    records = [job.done(f"p{i}", 20 + i, "aaaaaaaaaaaa") for i in range(3)]
    for record in records:
        (job.out / record.files[0]).unlink()
    job.write(
        "aaaaaaaaaaaa",
        [
            replace(record, parts=(FilePart(shared, 3 * n, 3, 9),))
            for n, record in enumerate(records)
        ],
    )
    assert job.check().ok
    Checkpoint(job.path).reset(["p0", "p2"])
    (job.out / shared).unlink()
    assert "'p1'" in job.problem()


def test_rows_that_do_not_count_are_a_note(job: Job) -> None:
    record = job.done("p", 20, "aaaaaaaaaaaa")
    file = record.files[0]
    job.write("aaaaaaaaaaaa", [replace(record, parts=(FilePart(file, 0, 3, 5),))])
    report = job.check()
    assert report.ok
    (note,) = report.notes
    assert "1 output files also have rows that do not count" in note
    assert file in note
    assert "ray-resume tidy" in note


def test_rows_that_are_on_record_twice(job: Job) -> None:
    records = [job.done(f"p{i}", 20 + i, "aaaaaaaaaaaa") for i in range(2)]
    (job.out / records[1].files[0]).unlink()
    shared = records[0].files[0]
    parts = FilePart(shared, 0, 3, 5), FilePart(shared, 2, 3, 5)
    job.write(
        "aaaaaaaaaaaa",
        [replace(record, parts=(part,)) for record, part in zip(records, parts, strict=True)],
    )
    assert f"rows that are on record twice: {shared}" in job.problem()


def test_rows_without_a_file(job: Job) -> None:
    record = replace(job.done("s0", 1, RUN), parts=())
    (job.out / job.name(RUN, 1)).unlink()
    job.put(source_digest("s0"), record)
    assert "have rows, but list no file: s0" in job.problem()


def test_left_overs_are_a_note(job: Job) -> None:
    (job.out / job.name(RUN, 77)).write_bytes(b"12345")
    (job.out / f".{job.name(OTHER, 78)}").write_bytes(b"12345")
    (job.out / "notes.txt").write_bytes(b"mine")
    report = job.check()
    assert report.ok
    assert "2 files" in report.notes[0]
    assert "10 bytes" in report.notes[0]


def test_left_overs_of_merged_runs_are_known(job: Job) -> None:
    (job.out / job.name(RUN, 77)).write_bytes(b"12345")
    Checkpoint(job.path).compact()
    report = job.check()
    assert report.ok
    assert "1 files" in report.notes[0]


def test_output_of_a_run_whose_file_was_removed(job: Job) -> None:
    job.file().unlink()
    assert "does not know" in job.problem()


def test_output_elsewhere_is_not_looked_at(job: Job) -> None:
    job.directory.bind("s3://bucket/out", "")
    report = job.check()
    assert report.ok
    assert "s3://bucket/out" in report.notes[0]


def test_a_checkpoint_inside_its_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    directory = LocalBackend(out / "_ckpt")
    name = f"{directory.ensure()}-{RUN}-{0:016x}-{0:016x}.parquet"
    directory.bind(str(out), "")
    (directory.path / name).write_bytes(b"somebody's copy")
    assert Checkpoint(directory.path).check() == CheckReport(
        str(directory.path), (), (), writers=0, records=0, sources=0, files=0
    )


# Beside a run.


def test_a_run_at_work_is_looked_at_and_told(job: Job) -> None:
    run_id = "cccccccccccc"
    lease = Lease.acquire(job.path, Owner.here(run_id), Claim(frozenset()), wait_s=0)
    writer = WriterFile.create(job.path, run_id, {"sources_total": 9})
    writer.commit([job.done("live", 30, run_id)])
    (job.out / job.name(run_id, 31)).write_bytes(b"not committed yet")
    report = job.check()
    assert (report.ok, report.sources, len(report.notes)) == (True, 9, 1)
    assert f"At work: run {run_id}" in report.notes[0]
    writer.close()
    lease.release()
    report = job.check()
    assert report.ok
    assert any(f"Did not end by itself: run {run_id}" in note for note in report.notes)
    assert any("leftovers" in note for note in report.notes)


def test_what_a_live_run_replaces_meanwhile_is_no_damage(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the records and at the folder a source gets new output."""
    run_id = "cccccccccccc"
    lease = Lease.acquire(job.path, Owner.here(run_id), Claim(frozenset()), wait_s=0)
    writer = WriterFile.create(job.path, run_id, {})
    really_look, looks = LocalBackend.scan, list[bool]()

    def look_then_replace(directory: LocalBackend) -> object:
        found = really_look(directory)
        if not looks:
            writer.commit([job.done("s4", 40, run_id)])
            (job.out / job.name(OTHER, 9)).unlink()
        looks.append(True)
        return found

    monkeypatch.setattr(LocalBackend, "scan", look_then_replace)
    assert job.check().ok
    assert len(looks) == 2
    writer.close()
    lease.end(wait_s=0)


def test_leases_are_looked_at_under_the_guard_alone(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look holds a dead run's lease for a moment. Somebody who looks then takes it for a live
    one, and does not read what it has committed.
    """
    Lease.acquire(job.path, Owner.here("cccccccccccc"), Claim(None), wait_s=0).release()
    really_held, looks = lease_module._is_held, list[Path]()

    def held(path: Path) -> bool:
        with (job.path / "lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        looks.append(path)
        return really_held(path)

    monkeypatch.setattr(lease_module, "_is_held", held)
    checkpoint = Checkpoint(job.path)
    checkpoint.status(), list(checkpoint.sources()), checkpoint.files(), checkpoint.check()
    assert len(looks) == 4
    checkpoint.reset(["s1"])
    checkpoint.compact()
