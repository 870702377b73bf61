"""Ctrl-C and SIGTERM: what is complete stays so, nothing lies about, the exit code is the usual."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import ray
from conftest import WITHOUT_TOKENS, holders, ids_in, write_source
from test_kill import FILES, ROWS, Job

from ray_resume import Checkpoint, CheckpointError, resumable, resumable_read, resumable_write
from ray_resume.interrupts import Interrupts

DRIVER = Path(__file__).with_name("driver.py")

# Ray types a UDF's argument as the union of all batch formats.
Batch: TypeAlias = Any


# --- The handlers ---


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Python's own handlers, whatever this process has."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


ENDS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "kind"), ENDS)
def test_a_signal_is_raised_and_afterwards_all_is_as_it_was(
    number: signal.Signals, kind: type[BaseException]
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(kind) as caught, Interrupts.caught() as interrupts:
        send(number)
    assert caught.value.args == ((143,) if kind is SystemExit else ())
    assert interrupts.first is number
    assert not interrupts.at_once
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "kind"), ENDS)
def test_what_is_held_ends_first(number: signal.Signals, kind: type[BaseException]) -> None:
    done = []

    def run() -> None:
        with Interrupts.caught() as interrupts:
            with interrupts.held():
                with interrupts.held():
                    send(number)
                    done.append("inner")
                done.append("outer")
            done.append("never")

    with pytest.raises(kind):
        run()
    assert done == ["inner", "outer"]


@pytest.mark.usefixtures("handlers")
def test_it_is_raised_once_and_another_one_gets_out_at_once() -> None:
    done = []

    def run(wait_s: float) -> None:
        with Interrupts.caught() as interrupts:
            try:
                send(signal.SIGINT)
            finally:
                with interrupts.held():
                    time.sleep(wait_s)
                    send(signal.SIGINT)
                    done.append(interrupts.at_once)
                done.append(interrupts.at_once)

    with pytest.raises(KeyboardInterrupt):
        run(0)  # An echo, as `timeout` makes it.
    assert done == [False, False]
    with pytest.raises(KeyboardInterrupt):
        run(0.6)
    assert done == [False, False]


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_handlers_of_the_users_are_theirs(number: signal.Signals) -> None:
    seen = []

    def mine(number: int, _: Any) -> None:
        seen.append(number)

    signal.signal(number, mine)
    with Interrupts.caught() as interrupts:
        assert signal.getsignal(number) is mine
        send(number)
    assert seen == [number]
    assert interrupts.first is None
    signal.signal(number, signal.SIG_IGN)
    with Interrupts.caught():
        send(number)
        assert signal.getsignal(number) is signal.SIG_IGN
    with Interrupts.caught():
        signal.signal(number, mine)  # Installed meanwhile: it stays.
    assert signal.getsignal(number) is mine


@pytest.mark.usefixtures("handlers")
def test_signals_are_not_another_threads() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def run() -> None:
        with Interrupts.caught() as interrupts, interrupts.held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


# --- A run in this process, as in a notebook ---


class Interrupted:
    """A run in this process, which gets signals when they are due."""

    def __init__(self, folder: Path) -> None:
        self.source, self.checkpoint, self.out = folder / "in", folder / "ckpt", folder / "out"
        write_source(self.source, files=12, rows=20)

    def committed(self) -> int:
        try:
            return Checkpoint(self.checkpoint).status().completed
        except CheckpointError:
            return 0

    def run(self, *, sleep: bool, sink: Any = None) -> Any:
        """Run; with ``sleep``, from the seventh file on a UDF sleeps for ever."""

        @resumable
        def doze(batch: Batch) -> Batch:
            if sleep and (batch["id"] >= 120).any():
                time.sleep(3600)
            return batch

        ds = resumable_read(
            ray.data.read_parquet,
            str(self.source),
            checkpoint=self.checkpoint,
            override_num_blocks=12,
        )
        # Each sleeps on a CPU of its own making, so that the others go on.
        ds = ds.map_batches(doze, num_cpus=0.05)
        return resumable_write(ds, sink or self.out)

    def interrupt(self, numbers: list[int], *, when: Callable[[], bool], gap_s: float = 1) -> None:
        """Run until it is interrupted by the signals ``numbers``, the first as soon as ``when``."""

        def watch() -> None:
            deadline = time.monotonic() + 120
            while not when() and time.monotonic() < deadline:
                time.sleep(0.02)
            for number in numbers:
                os.kill(os.getpid(), number)
                self.sent_at = time.monotonic()
                time.sleep(gap_s)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            self.run(sleep=True)
        finally:
            self.ended_at = time.monotonic()
            watcher.join()


@pytest.fixture
def interrupted(cluster: str, tmp_path: Path) -> Interrupted:
    return Interrupted(tmp_path)


@pytest.mark.parametrize(("number", "kind"), ENDS)
def test_a_run_over_udfs_that_sleep_for_ever_ends_in_order(
    interrupted: Interrupted,
    number: signal.Signals,
    kind: type[BaseException],
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = interrupted
    before = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(kind) as caught:
        job.interrupt([number], when=lambda: job.committed() == 6)
    assert caught.value.args == ((143,) if kind is SystemExit else ())
    assert job.ended_at - job.sent_at < 25, "SIGKILL would have come first"
    assert [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)] == before
    (told,) = [r.getMessage() for r in caplog.records if "interrupted" in r.getMessage()]
    assert f"interrupted by {number.name}" in told
    assert "6 of 12 sources are completed, 6 of them by this run" in told
    assert "Run the same script again" in told
    assert ids_in(job.out) == list(range(120))
    assert sorted(map(str, job.out.iterdir())) == Checkpoint(job.checkpoint).files()
    report = Checkpoint(job.checkpoint).check()
    assert report.ok, report
    assert report.notes == (), "no left-overs, no lease, nobody at work"

    summary = job.run(sleep=False)
    assert (summary.sources_skipped, summary.sources_completed) == (6, 6)
    assert ids_in(job.out) == list(range(240))


def test_a_second_ctrl_c_waits_for_nothing(interrupted: Interrupted) -> None:
    """The ledger does not answer any more: the first waits for it, the second does not."""
    job = interrupted
    ledgers: list[int] = []

    def stopped() -> bool:
        if job.committed() < 6:
            return False
        (lease,) = job.checkpoint.glob("*.lease")
        (ledger,) = (p for p in holders(lease) if p.pid != os.getpid())
        ledger.send_signal(signal.SIGSTOP)
        ledgers.append(ledger.pid)
        return True

    with pytest.raises(KeyboardInterrupt):
        job.interrupt([signal.SIGINT, signal.SIGINT], when=stopped, gap_s=1.5)
    assert job.ended_at - job.sent_at < 5
    for ledger in ledgers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(ledger, signal.SIGKILL)
    assert job.run(sleep=False).sources_skipped == 6
    assert ids_in(job.out) == list(range(240))


# --- Jobs of their own ---


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    write_source(tmp_path / "in", files=FILES, rows=ROWS)
    job = Job(tmp_path)
    yield job
    job.kill(with_descendants=True)


@pytest.mark.long
def test_a_job_with_a_cluster_of_its_own(job: Job) -> None:
    """Ctrl-C and a batch system's SIGTERM, which all processes of the job get."""
    for number, codes, at_least in (
        (signal.SIGINT, (-signal.SIGINT, 130), 3),
        (signal.SIGTERM, (143,), 10),
    ):
        job.process = subprocess.Popen(
            [sys.executable, str(DRIVER), str(job.source), str(job.checkpoint), str(job.out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=WITHOUT_TOKENS,
            start_new_session=True,
        )
        job.wait_for(lambda: job.committed() >= at_least)  # noqa: B023
        before = job.committed()
        sent_at = time.monotonic()
        os.killpg(job.process.pid, number)
        _, told = job.process.communicate(timeout=30)
        assert time.monotonic() - sent_at < 28
        assert job.process.returncode in codes, told
        done = job.committed()
        assert before <= done < FILES
        assert f"interrupted by {number.name}. {done} of {FILES} sources are completed" in told
        assert "Run the same script again" in told
        assert Checkpoint(job.checkpoint).files() == sorted(map(str, job.out.iterdir()))
        report = Checkpoint(job.checkpoint).check()
        assert report.ok, report
    job.start()
    assert f"{FILES - done} of {FILES} sources completed" in job.finish()
    job.check()
