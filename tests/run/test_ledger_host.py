"""The ledger's host without Ray: when it commits, what it publishes, and what threads do to it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from host_run import Run, wait_until
from store_files import records_in

from ray_resume.checkpoint.local.lmdb_file import WriterFile, read_writer
from ray_resume.core.ledger import LedgerError
from ray_resume.core.messages import DeadLetter, Drain, Failure, Message, Outcome, Seal
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Fingerprint, Record, State, pipeline_hash
from ray_resume.core.tokens import MODULUS
from ray_resume.errors import CheckpointError, ResumeError
from ray_resume.run.record_factory import Failed

pytestmark = pytest.mark.long

# Three rows in two files.
TWO = (FilePart("a", 0, 2, 2), FilePart("b", 5, 1, 9))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run that commits when it is told to."""
    started = Run(tmp_path)
    yield started
    started.end()


# When it commits.


def test_flush_commits_what_is_complete_and_tells_the_rest(run: Run) -> None:
    run.apply(Seal(0, 5, rows=2), Drain(0, MODULUS - 5, rows=3, parts=TWO))
    run.apply(Seal(1, 7, rows=4))
    run.apply(Seal(3, 0))
    assert run.committed() == {}
    before = time.time()
    progress = run.host.flush()
    assert (progress.completed, progress.committed) == (2, 2)
    assert (progress.rows_read, progress.rows_written, progress.files) == (2, 3, 2)
    assert set(progress.pending) == {1, 2}
    assert "4 rows were read" in (progress.example or "")

    committed = run.committed()
    assert set(committed) == {"s0", "s3"}
    assert before <= (committed["s0"].completed_at or 0) <= time.time()
    expected = Record(
        "s0",
        State.COMPLETED,
        1,
        "run",
        rows=3,
        parts=TWO,
        completed_at=committed["s0"].completed_at,
        fingerprint=Fingerprint(0, 0),
        pipeline=pipeline_hash("read>f"),
    )
    assert committed["s0"] == expected
    assert committed["s3"].sequence == 2


def test_nothing_is_committed_before_the_driver_has_confirmed_its_lease(tmp_path: Path) -> None:
    run = Run(tmp_path, commit_interval_s=0.01)
    run.host.hold_commits()
    run.apply(Seal(0, 0))
    progress = run.host.flush()
    assert (progress.completed, progress.committed) == (1, 0)
    # The thread that commits regularly waits as well.
    time.sleep(0.1)
    assert run.committed() == {}
    for commit in (lambda: run.host.drop(["gone"]), run.host.mark_rest_failed):
        with pytest.raises(ResumeError, match="unconfirmed"):
            commit()
    assert run.committed() == {}

    run.host.confirm_lease()
    wait_until(lambda: set(run.committed()) == {"s0"})
    run.host.drop(["gone"])
    run.end()

    ended = Run(tmp_path, "other")
    ended.host.hold_commits()
    ended.apply(Seal(0, 0))
    ended.end()
    assert records_in(ended.file) == {}


def test_counts_say_which_rows_a_kill_would_cost_and_commit_nothing(run: Run) -> None:
    # Complete, read to its end, half written while it is read, and not heard of.
    run.apply(Seal(0, 5, rows=2), Drain(0, MODULUS - 5, rows=3, parts=TWO))
    run.apply(Seal(1, 7, rows=40))
    run.apply(Drain(1, 1, rows=30), Drain(2, 1, rows=500))
    run.apply(Failure(3, 9, rows=1, error="bad"))
    counts = run.host.counts()
    assert (counts.sources, counts.pass_number, counts.messages) == (4, 1, 4)
    assert (counts.completed, counts.committed, counts.failed) == (1, 0, 1)
    assert (counts.rows_read, counts.rows_written, counts.rows_in_flight) == (2, 3, 540)
    assert counts.rows_at_risk == 542
    assert run.committed() == {}

    run.host.flush()
    assert run.host.counts().rows_at_risk == 540
    run.host.begin_pass(2)
    assert run.host.counts().rows_at_risk == 0
    run.host.mark_rest_failed()
    assert run.host.counts().quarantined == 0
    assert read_writer(run.file, live=True)[0]["sources_total"] == 4


def test_the_slowest_sources_are_known_by_name(run: Run) -> None:
    now = time.time()
    run.apply(Seal(0, 5, began_at=now - 50), Seal(1, 0, began_at=now - 9), Seal(2, 0))
    run.apply(Seal(3, 0, began_at=now + 30))
    assert list(run.host.facts()["slowest"].values()) == pytest.approx([9, 0], abs=0.5)
    run.apply(Drain(0, MODULUS - 5, rows=1, parts=TWO))
    slowest = run.host.flush().slowest
    assert list(slowest.values()) == pytest.approx([50, 9, 0], abs=0.5)
    assert list(slowest) == [run.spec.sources.id(source) for source in (0, 1, 3)]


def test_completions_are_committed_soon_without_a_flush(tmp_path: Path) -> None:
    run = Run(tmp_path, commit_interval_s=0.05)
    for source in range(3):
        began = time.monotonic()
        run.apply(Seal(source, 0))
        wait_until(lambda source=source: f"s{source}" in run.committed())  # type: ignore[misc]
        # Generous, for busy machines: the point is that nobody had to ask.
        assert time.monotonic() - began < 5
    run.end()


def test_a_completion_waits_only_for_the_rest_of_the_interval_since_the_last_commit(
    tmp_path: Path,
) -> None:
    interval_s = 300.0
    run = Run(tmp_path, commit_interval_s=interval_s)
    # As if the last commit were so long ago.
    run.host._committer._thread._grouped_at -= interval_s
    run.apply(Seal(0, 0))
    wait_until(lambda: "s0" in run.committed())
    run.apply(Seal(1, 0))
    time.sleep(1)
    assert "s1" not in run.committed()
    run.end()


def test_sequences_go_on_where_the_union_ended(tmp_path: Path) -> None:
    run = Run(tmp_path, first_sequence=41)
    run.apply(Seal(0, 0))
    run.host.flush()
    run.apply(Seal(1, 0))
    run.host.fail({2: Failed("boom", counts_toward_quarantine=True)})
    run.end()
    sequences = {record.source_id: record.sequence for record in records_in(run.file).values()}
    assert sorted(sequences.values()) == [42, 43, 44]
    assert sequences["s0"] == 42


def test_close_commits_and_refuses_what_comes_later(run: Run) -> None:
    run.apply(Seal(0, 0))
    assert run.host.close().committed == 1
    for late in (
        lambda: run.apply(Seal(1, 0)),
        lambda: run.host.fail({1: Failed("late", counts_toward_quarantine=True)}),
    ):
        with pytest.raises(ResumeError):
            late()
    assert set(records_in(run.file)) == {"s0"}
    assert run.host.close().committed == 1
    # It lets go of its share of the lease, and so does the driver in turn.
    assert run.lease.is_last_holder(wait_s=0)


def test_illegal_messages_change_nothing(run: Run) -> None:
    legal = Seal(0, 0)
    for message in (
        Message("other", 1, (legal,)),
        Message("run", 2, (legal,)),
        Message("run", 1, (legal, Seal(4, 0))),
        Message("run", 1, (legal, Drain(1, MODULUS))),
    ):
        with pytest.raises(LedgerError):
            run.host.apply(message)
    assert run.host.flush().completed == 0
    assert run.committed() == {}


def test_a_new_pass_forgets_sums_and_keeps_what_is_complete(run: Run) -> None:
    run.apply(Seal(0, 0), Seal(1, 5))
    run.host.begin_pass(2)
    with pytest.raises(LedgerError):
        run.apply(Drain(1, MODULUS - 5))
    again = Message("run", 2, (Seal(0, 9), Seal(1, 6), Drain(1, MODULUS - 6)))
    assert run.host.apply(again).outcomes[0] is Outcome.ALREADY_COMPLETE
    assert run.host.flush().committed == 2
    assert set(run.committed()) == {"s0", "s1"}


# Threads.


def test_threads_that_apply_at_once_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, faults = 3000, list[BaseException]()
    committing, commit = threading.Lock(), WriterFile.commit

    def commit_alone(self: WriterFile, records: Iterable[Record]) -> None:
        assert committing.acquire(blocking=False), "two commits at once"
        try:
            commit(self, records)
        finally:
            committing.release()

    monkeypatch.setattr(WriterFile, "commit", commit_alone)
    run = Run(tmp_path, sources=sources, commit_interval_s=0.01)

    def send(make: Callable[[int], Seal | Drain], order: Sequence[int]) -> None:
        try:
            for source in order:
                run.apply(make(source))
                if source % 100 == 0:
                    run.host.flush()
        except BaseException as fault:
            faults.append(fault)

    jobs = [
        (lambda source: Seal(source, source + 3, rows=2), range(sources)),
        (lambda source: Drain(source, MODULUS - 1, rows=1), range(sources - 1, -1, -1)),
        (lambda source: Drain(source, MODULUS - source - 2, rows=1), range(sources)),
    ]
    threads = [threading.Thread(target=send, args=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    progress = run.host.close()
    run.end()
    assert not faults
    assert (progress.completed, progress.committed) == (sources, sources)
    assert (progress.rows_read, progress.rows_written) == (2 * sources, 2 * sources)
    records = records_in(run.file)
    assert len(records) == sources
    # Each has a number of its own.
    assert {record.sequence for record in records.values()} == set(range(1, sources + 1))


@pytest.mark.extended
def test_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = 200_000
    run = Run(tmp_path, sources=count, commit_interval_s=0.2)
    messages = [Message("run", 1, (Seal(source, 0),)) for source in range(count)]
    began = time.monotonic()
    for message in messages:
        run.host.apply(message)
    applied_s = time.monotonic() - began
    assert run.host.close().committed == count
    durable_s = time.monotonic() - began
    run.end()
    with capsys.disabled():
        sys.stdout.write(
            f"\n{count} sources, one message each: applied {count / applied_s:,.0f}/s, "
            f"durable {count / durable_s:,.0f}/s\n"
        )


def test_letters_of_a_source_that_is_complete_are_not_kept(run: Run) -> None:
    """A task whose letters had arrived was executed again: by then nobody remembers the source."""
    table = pa.table({"id": [1]})
    letter = DeadLetter.of(0, 5, "map(f)", table, ["bad"])
    run.host.write_dead_letters("run", 1, [letter])
    run.apply(Seal(0, 5, 1))
    run.host.flush()
    folder = run.directory.path / "dead-letters"
    (kept,) = folder.iterdir()
    again = run.host.write_dead_letters("run", 1, [letter])
    assert again.outcomes == (Outcome.ALREADY_COMPLETE,)
    assert list(folder.iterdir()) == [kept]


# Output that is nobody's any more.


def test_sources_are_dropped_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path, first_sequence=7)
    run.host.drop(["gone", "x"])
    assert {name: r.state for name, r in run.committed().items()} == {
        "gone": State.RESET,
        "x": State.RESET,
    }
    assert run.committed()["gone"].files == ()
    run.apply(Seal(0, 0))
    progress = run.host.flush()
    assert (progress.committed, progress.dropped) == (1, 2)
    assert sorted(record.sequence for record in run.committed().values()) == [8, 9, 10]
    run.end()


def test_what_is_published_is_on_record_before_and_committed_after(tmp_path: Path) -> None:
    run = Run(tmp_path, table="datasink Table")
    store = run.directory.publications()
    for source in (0, 1):
        results = (b"result",) if source == 0 else ()
        run.apply(Seal(source, 5, rows=2), Drain(source, MODULUS - 5, rows=2, results=results))
    assert run.host.flush().committed == 1, "the other one has nothing to publish"
    taken = run.host.take_unpublished("17")
    assert taken is not None
    assert (taken.number, taken.results, taken.rows, taken.again) == (1, [b"result"], 2, False)
    (name,) = store.names()
    publication = store.read(name)
    assert publication is not None
    assert (publication.sink, publication.position) == ("datasink Table", "17")
    run.apply(Seal(2, 5, rows=2), Drain(2, MODULUS - 5, rows=2, results=(b"more",)))
    again = run.host.take_unpublished("18")
    assert again == taken._replace(again=True)
    assert run.host.flush().committed == 1
    run.host.confirm_published(1)
    assert run.committed()["s0"] == next(iter(publication.log))
    assert not store.names()
    second = run.host.take_unpublished("18")
    assert second is not None
    assert (second.number, second.results) == (2, [b"more"])
    assert run.host.close().committed == 2
    assert len(store.names()) == 1, "the next run asks the table about it"
    assert run.host.counts().committed == 2
    run.end()


def test_what_cannot_be_recorded_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, table="datasink Table")
    run.apply(Seal(0, 5, rows=2), Drain(0, MODULUS - 5, rows=2, results=(b"result",)))
    (tmp_path / "publications").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        run.host.take_unpublished(None)
    (tmp_path / "publications").unlink()
    taken = run.host.take_unpublished(None)
    assert taken is not None
    assert (taken.number, taken.results, taken.again) == (2, [b"result"], False)
    run.end()
