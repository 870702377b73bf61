"""`check`: what is sound is called sound, what is damaged is told by name, whatever LMDB does."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import lmdb
import pytest
from checked_job import OTHER, RUN, Job
from raw_store import put, put_block, scatter_records
from snapshots import whole_files

from ray_resume import Checkpoint, CheckpointError
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.checkpoint.local.reader import read_writers
from ray_resume.core.digests import source_digest
from ray_resume.core.records import Record, encode

pytestmark = pytest.mark.long


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
