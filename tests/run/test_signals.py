"""Ctrl-C and SIGTERM: the run ends in order, says how far it is, and the next goes on."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from job import Job

from ray_resume import Checkpoint
from ray_resume.run.signals import Terminated, raise_on_sigterm

pytestmark = [pytest.mark.extended, pytest.mark.long]


def test_sigterm_raises_where_nobody_else_handles_it() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(Terminated) as caught, raise_on_sigterm():
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_ctrl_c_stays_a_keyboard_interrupt_and_has_its_exit_code() -> None:
    with pytest.raises(KeyboardInterrupt) as caught, raise_on_sigterm():
        signal.raise_signal(signal.SIGINT)
    assert isinstance(caught.value, SystemExit)
    assert caught.value.code == 130


def test_a_handler_of_the_users_own_stays() -> None:
    def own(*_: object) -> None:
        seen.append("own")

    seen: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    try:
        for handler in (own, signal.SIG_IGN):
            signal.signal(signal.SIGTERM, handler)
            with raise_on_sigterm():
                os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) is handler
        assert seen == ["own"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_one_that_is_set_meanwhile_stays() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with raise_on_sigterm():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_nothing_is_changed() -> None:
    def look() -> None:
        with raise_on_sigterm():
            handlers.append(signal.getsignal(signal.SIGTERM))

    handlers: list[object] = []
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.long
def test_an_interrupted_job_ends_in_order_and_is_resumed(job_on_cluster: Job) -> None:
    job = job_on_cluster
    done = 0

    def enough() -> bool:
        return job.committed() >= done + 4

    for sent, exit_code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        job.start()
        job.wait_for(enough)
        job.process.send_signal(sent)
        output, _ = job.process.communicate(timeout=60)
        assert job.process.returncode == exit_code, output
        done = job.committed()
        assert f"was interrupted: {done} of 24 sources are completed and safe" in output
        assert "Run the same script again" in output
        # Nothing is left over.
        status = Checkpoint(job.checkpoint).status()
        assert status.live == 0
        assert Checkpoint(job.checkpoint).files() == sorted(map(str, job.out.iterdir()))
    job.start()
    job.finish()
    job.check()


@pytest.mark.slow
def test_sigterm_to_every_process_at_once_as_slurm_sends_it(job: Job) -> None:
    job.start()
    job.wait_for(lambda: job.committed() >= 4)
    job.signal_all(signal.SIGTERM)
    output, _ = job.process.communicate(timeout=60)
    # Ray ends a driver that misses its raylet, which got the signal as well.
    assert job.process.returncode in (143, 1), output
    job.start()
    job.finish()
    job.check()
