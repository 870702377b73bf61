"""The sources that runs have listed: what is gone from the input is not pending for ever."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from ray_resume import Checkpoint, CheckpointError
from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.location import Location
from ray_resume.core.digests import Digests, source_digest
from ray_resume.core.records import Record, State, dropped_record, encode

pytestmark = pytest.mark.long

START = Owner.here("0" * 12)


def run(number: int) -> str:
    return f"{number:012x}"


def digests(listed: Sequence[str]) -> Digests:
    return Digests.of(b"".join(map(source_digest, listed)))


class Job:
    """A checkpoint of either kind, and runs on it without Ray."""

    def __init__(self, folder: Path, *, shared: bool) -> None:
        self.checkpoint = Checkpoint(folder / "ckpt", shared=shared)
        self.storage: CheckpointBackend = Location(str(folder / "ckpt"), shared=shared).open()
        self.storage.ensure()
        self._runs = self._sequence = 0

    def start(self, *listed: str) -> tuple[str, object]:
        self._runs += 1
        owner = Owner.here(run(self._runs))
        lease = self.storage.acquire(owner, Claim(b""), wait_s=0)
        self.storage.record_listed(digests(listed), owner.run_id)
        return owner.run_id, lease

    def run(self, *listed: str, done: str = "", failed: str = "", dropped: str = "") -> None:
        """Be a run that lists sources, commits records, and ends. A source's id is a letter."""
        run_id, lease = self.start(*listed)
        records = [
            *(self._record(one, run_id, State.COMPLETED) for one in done),
            *(self._record(one, run_id, State.FAILED) for one in failed),
            *(dropped_record(one, self._next(), run_id) for one in dropped),
        ]
        if records:
            header = {"sources_total": len(listed)}
            self.storage.write_whole(run_id, header, encode(records))
        lease.end(wait_s=1)  # type: ignore[attr-defined]

    def counts(self) -> tuple[int, int, int, int]:
        status = self.checkpoint.status()
        return status.total, status.completed, status.failed, status.pending

    def _record(self, source_id: str, run_id: str, state: State) -> Record:
        return Record(source_id, state, self._next(), run_id, rows=1)

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence


@pytest.fixture(params=["local", "shared"])
def job(tmp_path: Path, request: pytest.FixtureRequest) -> Job:
    return Job(tmp_path, shared=request.param == "shared")


def test_what_the_newest_run_does_not_list_is_not_pending(job: Job) -> None:
    job.run(*"abcd", done="a", failed="b")
    assert job.counts() == (4, 1, 1, 2)
    # The completed and the failed ones still have a record.
    job.run(*"d")
    assert job.counts() == (3, 1, 1, 1)
    job.run(*"d", done="d")
    assert job.counts() == (3, 2, 1, 0)
    job.run()
    assert job.counts() == (3, 2, 1, 0)


def test_another_listing_of_sources_does_not_hide_those_that_are_pending(job: Job) -> None:
    """Four are on record, and as many are listed: that says nothing of how many are left."""
    job.run(*"abc", done="abc")
    job.run(*"defg", done="d")
    assert job.counts() == (7, 4, 0, 3)
    job.checkpoint.reset(["a", "d"])
    assert job.counts() == (6, 2, 0, 4)


def test_removed_sources_are_neither_pending_nor_completed(job: Job) -> None:
    job.run(*"abc", done="abc")
    job.run(*"ab", dropped="c")
    assert job.counts() == (2, 2, 0, 0)
    job.run(*"abc")
    assert job.counts() == (3, 2, 0, 1)


def test_listings_of_runs_beside_each_other_all_count(job: Job) -> None:
    _, first = job.start(*"abc")
    _, second = job.start(*"cde")
    assert job.counts() == (5, 0, 0, 5)
    first.end(wait_s=1)  # type: ignore[attr-defined]
    # The second run is alive, and the first may have been killed before it was done.
    job.run(*"ef", done="f")
    assert job.counts() == (6, 1, 0, 5)
    second.end(wait_s=1)  # type: ignore[attr-defined]
    job.run(*"ef")
    assert job.counts() == (2, 1, 0, 1)


def test_what_is_listed_again_is_not_written_again(tmp_path: Path) -> None:
    job = Job(tmp_path, shared=False)
    job.run(*"ab")
    (listing,) = (tmp_path / "ckpt/listings").iterdir()
    written = listing.stat().st_mtime_ns
    job.run(*"ab")
    (listing,) = (tmp_path / "ckpt/listings").iterdir()
    assert listing.stat().st_mtime_ns == written


def test_a_damaged_listing_is_named_and_not_counted(tmp_path: Path) -> None:
    job = Job(tmp_path, shared=False)
    job.run(*"ab", done="a")
    (listing,) = (tmp_path / "ckpt/listings").iterdir()
    listing.write_bytes(listing.read_bytes()[:16])
    with pytest.raises(CheckpointError, match=r"listings/\w+.digests is damaged"):
        job.checkpoint.status()
    # As the message says.
    listing.unlink()
    assert job.counts() == (2, 1, 0, 1)
    job.run(*"ab")
    assert job.counts() == (2, 1, 0, 1)
