"""`check`: what is sound is called sound, what is damaged is told by name, whatever LMDB does."""

from __future__ import annotations

import fcntl
import json
import os
import random
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import lmdb
import pytest
from raw_store import put, put_block, put_record, scatter_records
from snapshots import whole_files

from ray_resume import Checkpoint, CheckpointError, CheckReport
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local import lease as lease_module
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.checkpoint.local.reader import read_writers
from ray_resume.core.digests import source_digest
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record, State, encode

pytestmark = pytest.mark.long

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


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_a_sound_checkpoint(job: Job) -> None:
    report = job.check()
    assert report.ok
    assert report
    assert (report.problems, report.notes) == ((), ())
    assert (report.writers, report.records, report.sources, report.files) == (2, 12, 8, 8)
    assert str(report) == (
        f"The checkpoint {job.path} is sound (2 writers' files, 12 records, 8 sources, "
        "8 output files)."
    )
    with pytest.raises(FrozenInstanceError):
        report.writers = 1  # type: ignore[misc]


def test_it_changes_nothing(job: Job) -> None:
    def look() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in job.path.parent.rglob("*") if path.is_file()}

    before = look()
    job.check()
    assert {path: data for path, data in look().items() if path.name != "lock"} == {
        path: data for path, data in before.items() if path.name != "lock"
    }


def test_before_the_first_run(tmp_path: Path) -> None:
    LocalBackend(tmp_path / "new").ensure()
    report = Checkpoint(tmp_path / "new").check()
    assert (report.ok, report.writers, report.records, report.notes) == (True, 0, 0, ())


def test_after_a_compaction_and_a_reset(job: Job) -> None:
    Checkpoint(job.path).reset(["s1"])
    Checkpoint(job.path).compact()
    report = job.check()
    assert (report.ok, report.writers, report.sources) == (True, 1, 8)


def test_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        Checkpoint(tmp_path / "none").check()


# Files that are not what their name says.


def test_a_file_that_lmdb_refuses(job: Job) -> None:
    job.file().write_bytes(random.Random(0).randbytes(50_000))
    assert str(job.file()) in job.problem()
    assert job.check().sources == 4, "the other file is looked at all the same"


def test_a_file_cut_short(job: Job) -> None:
    os.truncate(job.file(), job.file().stat().st_size - 4096)
    assert str(job.file()) in job.problem()


def test_a_foreign_file(job: Job) -> None:
    with lmdb.open(str(job.path / "x.mdb"), subdir=False) as env, env.begin(write=True) as t:
        t.put(b"k", b"v")
    assert f"{job.path / 'x.mdb'} cannot be read" in job.problem()


def test_a_newer_format(job: Job) -> None:
    header = {"format": 99, "run_id": RUN}
    put(job.file(), b"header", json.dumps(header).encode())
    problem = job.problem()
    assert str(job.file()) in problem
    assert "Upgrade ray_resume" in problem


@pytest.mark.extended
def test_a_page_of_zeros_kills_no_more_than_a_child(tmp_path: Path) -> None:
    """LMDB ends the process that touches it; the files after it are read by another one."""
    job = Job(tmp_path, 400)
    scatter_records(job.file())
    data = job.file().read_bytes()
    for page in range(2, len(data) // 4096):
        job.file().write_bytes(data[: page * 4096] + bytes(4096) + data[(page + 1) * 4096 :])
        (first, second) = read_writers({RUN: (job.file(), False), OTHER: (job.file(OTHER), False)})
        assert (second.error, len(second.records)) == (None, 200)
        if first.error is not None and "SIG" in str(first.error):
            break
    else:
        pytest.fail("LMDB survived it all, and nothing was proved.")
    assert str(job.file()) in job.problem()
    assert job.check().sources == 200
    with pytest.raises(CheckpointError, match=r"0123456789ab\.mdb.*restore it from a copy"):
        Checkpoint(job.path).status()


@pytest.mark.extended
def test_every_way_of_looking_survives_damage(tmp_path: Path) -> None:
    """Bits, bytes and pages at random: an error of ours or nothing at all, never a dead process."""
    job = Job(tmp_path, 400)
    sound, moments = job.file(OTHER).read_bytes(), random.Random(1)
    outcomes = set()
    for turn in range(40):
        data = bytearray(sound)
        page = 4096 * moments.randrange(len(data) // 4096)
        kind = turn % 4
        if kind == 0:
            data[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
        elif kind == 1:
            for _ in range(30):
                data[moments.randrange(len(data))] = moments.randrange(256)
        elif kind == 2:
            data[page : page + 4096] = moments.randbytes(4096)
        else:
            data[page : page + 4096] = bytes(4096)
        job.file(OTHER).write_bytes(data)
        report = job.check()
        outcomes.add(report.ok)
        for problem in report.problems:
            assert str(job.path) in problem, problem
        try:
            Checkpoint(job.path).status()
            list(Checkpoint(job.path).sources())
        except CheckpointError as error:
            told = str(error)
            assert not report.ok
            assert str(job.file(OTHER)) in told
            assert "\n" not in told
    assert outcomes == {True, False}


def test_a_child_that_was_killed_is_not_called_damage(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ray_resume.checkpoint.local.reader._CHILD", "import os; os.kill(os.getpid(), 9)"
    )
    (reading,) = read_writers({RUN: (job.file(), False)})
    assert reading.error is not None
    assert "The file may be sound" in str(reading.error)
    assert "signal 9" in str(reading.error)


# Records that are not what they should be.


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r: replace(r, source_id="other"), "under another source's key"),
        (lambda r: replace(r, run_id=OTHER), "which did not write it"),
        (lambda r: replace(r, sequence=0), "impossible numbers"),
        (lambda r: replace(r, rows=-1), "impossible numbers"),
        (lambda r: replace(r, sequence=2), "sequence number 2 twice"),
        (lambda r: replace(r, parts=whole_files("../x")), "outside of the output folder"),
        (lambda r: replace(r, parts=whole_files("/etc/x")), "outside of the output folder"),
    ],
)
def test_a_record_that_cannot_be(job: Job, change: Callable[[Record], Record], told: str) -> None:
    record = job.done("s0", 1, RUN)
    job.put(source_digest("s0"), change(record))
    assert any(told in problem for problem in job.check().problems)
    assert any(str(job.file()) in problem for problem in job.check().problems)


def test_a_block_that_cannot_be_read(job: Job) -> None:
    put_block(job.file(), next(encode([job.done("s0", 1, RUN)]))[:-2])
    problem = job.problem()
    assert "is not as it was written" in problem
    assert str(job.file()) in problem
    assert job.check().sources == 4, "the other file is looked at all the same"


def test_a_screen_is_enough_for_any_number_of_faults(job: Job) -> None:
    for i in range(8):
        job.put(source_digest(f"s{i}"), job.done(f"other {i}", 100 + i, RUN))
    problems = job.check().problems
    assert len(problems) <= 6
    assert max(map(len, problems)) < 400


def test_a_renamed_file(job: Job) -> None:
    job.file().rename(job.path / "copy.mdb")
    assert any(f"is the file of run {RUN} under another name" in p for p in job.check().problems)


def test_files_that_contradict_each_other(job: Job) -> None:
    record = job.done("s0", 1, RUN)
    WriterFile.create(job.path, "merged", {"merged": {RUN: {}}}).close()
    writer = WriterFile.create(job.path, "merged2", {"merged": {RUN: {}}})
    writer.commit([replace(record, rows=99)])
    writer.close()
    assert "contradicts another file about 's0'" in job.problem()


@pytest.mark.parametrize("content", [None, b"{", b'{"format": 9, "id": "x", "sink": null}'])
def test_an_identity_that_is_gone_or_damaged_or_newer(job: Job, content: bytes | None) -> None:
    if content is None:
        (job.path / "checkpoint.json").unlink()
    else:
        (job.path / "checkpoint.json").write_bytes(content)
    report = job.check()
    assert not report.ok
    assert str(job.path) in report.problems[0]
    assert report.sources == 8


# The output.


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
