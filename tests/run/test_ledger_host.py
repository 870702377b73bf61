"""The ledger's host without Ray: when it commits, when it refuses, and what SIGSTOP does to it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from snapshots import whole_files

from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.backend import LocalBackend, LocalLedgerBinding
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.local.lmdb_file import WriterFile, read_writer
from ray_resume.core.ledger import LedgerError
from ray_resume.core.messages import DeadLetter, Drain, Event, Failure, Message, Outcome, Seal
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Fingerprint, Record, State, pipeline_hash
from ray_resume.core.sources import Source, SourceTable
from ray_resume.core.tokens import MODULUS
from ray_resume.errors import CheckpointError, ResumeError
from ray_resume.run.ledger_host import LedgerHost
from ray_resume.run.record_factory import Failed
from ray_resume.run.run_spec import RunSpec

pytestmark = pytest.mark.long

DEADLINE_S = 20.0

# Three rows in two files.
TWO = (FilePart("a", 0, 2, 2), FilePart("b", 5, 1, 9))


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def records_in(path: Path, *, live: bool = False) -> dict[str, Record]:
    """What a writer's file holds, by source id."""
    return {record.source_id: record for record in read_writer(path, live=live)[1]}


def table(fingerprints: Iterable[Fingerprint]) -> SourceTable:
    return SourceTable.of(Source(f"s{i}", None, known) for i, known in enumerate(fingerprints))


class Run:
    """A driver's share of a run: its lease, and its host in this process."""

    def __init__(
        self,
        path: Path,
        run_id: str = "run",
        *,
        sources: int = 4,
        commit_interval_s: float = 3600.0,
        **spec: Any,
    ) -> None:
        self.directory = LocalBackend(path)
        self.directory.ensure()
        owner = Owner.here(run_id)
        self.lease = Lease.acquire(self.directory.path, owner, Claim(None), wait_s=0)
        values: dict[str, Any] = {
            "run_id": run_id,
            "binding": LocalLedgerBinding(
                str(path), str(self.lease.path), run_id, commit_interval_s=commit_interval_s
            ),
            "sources": table(Fingerprint(i, 10 * i) for i in range(sources)),
            "records": {},
            "max_failed_runs": 3,
            "first_sequence": 0,
            "signature": "read>f",
            "header": {"sources_total": sources},
        }
        self.spec = RunSpec(**{**values, **spec})
        self.file = path / f"{run_id}.mdb"
        self.host = LedgerHost(self.spec)
        self.host.begin_pass(1)

    def apply(self, *events: Event) -> Any:
        return self.host.apply(Message(self.spec.run_id, 1, events))

    def committed(self) -> dict[str, Record]:
        return records_in(self.file, live=True)

    def end(self) -> None:
        with contextlib.suppress(ResumeError):
            self.host.close()
        self.lease.end(wait_s=0)


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
    run.host._committer._grouped_at -= interval_s
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


# Faults.


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


# Failed sources.


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


# Processes.

DRIVER = """
import sys
from pathlib import Path
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.lease import Lease

lease = Lease.acquire(Path(sys.argv[1]), Owner.here("old"), Claim(None), wait_s=0)
print("held", flush=True)
sys.stdin.read()
"""

HOST = """
import os, signal, sys, time
from pathlib import Path
from ray_resume.run.ledger_host import LedgerHost
from ray_resume.run.run_spec import RunSpec
from ray_resume.checkpoint.local.backend import LocalLedgerBinding
from ray_resume.errors import ResumeError
from ray_resume.core.messages import Message, Seal
from ray_resume.core.sources import Source, SourceTable

sources = SourceTable.of(Source(f"s{i}", None) for i in range(3))
lease = str(Path(sys.argv[1]) / "old.lease")
binding = LocalLedgerBinding(sys.argv[1], lease, "old", commit_interval_s=0.3)
spec = RunSpec("old", binding, sources, {}, 3, 0, "", {"sources_total": 3})
host = LedgerHost(spec)
host.begin_pass(1)
host.apply(Message("old", 1, (Seal(0, 0),)))
host.flush()
host.apply(Message("old", 1, (Seal(1, 0),)))
os.kill(os.getpid(), signal.SIGSTOP)
# It goes on here when it is continued, with one source complete and not committed.
try:
    while True:
        host.apply(Message("old", 1, (Seal(2, 1),)))
        time.sleep(0.01)
except ResumeError as error:
    print(error, flush=True)
"""


@contextlib.contextmanager
def process(code: str, *args: object) -> Iterator[subprocess.Popen[str]]:
    """A process, killed at the end."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(DEADLINE_S, child.kill)
    watchdog.start()
    try:
        yield child
    finally:
        watchdog.cancel()
        child.kill()
        child.communicate()


@contextlib.contextmanager
def stopped_host_of_a_killed_driver(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A host that was stopped between a completion and its commit, and outlived its driver."""
    LocalBackend(path).ensure()
    with process(DRIVER, path) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "held\n"
        with process(HOST, path) as host:
            # Says when a child stops, without taking its exit status from subprocess.
            os.waitid(os.P_PID, host.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            driver.kill()
            driver.wait()
            yield host


def successor(path: Path) -> Lease:
    return Lease.acquire(path, Owner.here("new"), Claim(None), wait_s=0.5)


def test_a_stopped_host_keeps_its_successor_out_until_it_is_dead(tmp_path: Path) -> None:
    with stopped_host_of_a_killed_driver(tmp_path) as host:
        # Longer than it would take to commit, if it ran.
        with pytest.raises(CheckpointError, match="run old"):
            successor(tmp_path)
        assert set(records_in(tmp_path / "old.mdb", live=True)) == {"s0"}
        host.kill()
        host.wait()
        lease = successor(tmp_path)
        settled = LocalBackend(tmp_path).committed_by_dead_runs("new")
        assert {record.source_id for record in settled.snapshot} == {"s0"}
        assert settled.dead_runs == {"old"}
        lease.end(wait_s=0)


def test_a_host_that_wakes_up_without_its_lease_commits_nothing(tmp_path: Path) -> None:
    with stopped_host_of_a_killed_driver(tmp_path) as host:
        # Somebody is tired of waiting, and removes the lease by hand.
        (tmp_path / "old.lease").unlink()
        lease = successor(tmp_path)
        host.send_signal(signal.SIGCONT)
        assert "lost" in host.communicate(timeout=DEADLINE_S)[0]
        assert set(records_in(tmp_path / "old.mdb")) == {"s0"}
        lease.check()
        lease.end(wait_s=0)


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
