"""A lease that several processes of a run hold: killed, stopped, and forked ones."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from children import DEADLINE_S, process
from local_leases import EVERYTHING, HOLD, JOIN, acquire, is_free, kill

from ray_resume.checkpoint.local import lease as lease_module
from ray_resume.checkpoint.local.lease import Lease, live_runs
from ray_resume.errors import CheckpointError

pytestmark = pytest.mark.long


# Several processes of one run.


def test_a_killed_holder_lets_go(tmp_path: Path) -> None:
    with process(HOLD, tmp_path) as holder:
        assert not is_free(tmp_path)
        assert live_runs(tmp_path)["holder"].pid == holder.pid
        kill(holder)
        assert live_runs(tmp_path) == {}
        assert is_free(tmp_path)
        assert not (tmp_path / "holder.lease").exists()


def test_the_lease_of_a_killed_driver_lives_on_in_the_process_that_joined(tmp_path: Path) -> None:
    with process(HOLD, tmp_path) as driver, process(JOIN, tmp_path) as ledger:
        kill(driver)
        assert not is_free(tmp_path)
        assert live_runs(tmp_path)["holder"].pid == driver.pid
        kill(ledger)
        assert is_free(tmp_path)


def test_a_stopped_holder_keeps_its_lease(tmp_path: Path) -> None:
    with process(HOLD, tmp_path) as holder:
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(CheckpointError, match="holder"):
            acquire(tmp_path, "second", wait_s=0.3)
        kill(holder)
        assert is_free(tmp_path)


def test_a_dead_run_cannot_be_joined(tmp_path: Path) -> None:
    """Another run may have been let in since; a late ledger must not bring the dead one back."""
    with process(HOLD, tmp_path) as driver:
        kill(driver)
    lease_file = tmp_path / "holder.lease"
    content = lease_file.read_bytes()
    with pytest.raises(CheckpointError, match="has ended"):
        Lease.join(lease_file)
    successor = acquire(tmp_path, "successor")
    with pytest.raises(CheckpointError, match="has ended"):
        Lease.join(lease_file)
    lease_file.write_bytes(content)
    with pytest.raises(CheckpointError, match="has ended"):
        Lease.join(lease_file)
    assert set(live_runs(tmp_path)) == {"successor"}
    successor.end(wait_s=0)
    with pytest.raises(CheckpointError, match="has ended"):
        Lease.join(tmp_path / "never.lease")


def test_alone_until_another_process_joins_and_again_after(tmp_path: Path) -> None:
    lease = acquire(tmp_path, "holder")
    assert lease.is_last_holder(wait_s=0)
    with process(JOIN, tmp_path) as ledger:
        assert not lease.is_last_holder(wait_s=0.2)
        # Asking must not cost the lease.
        assert not is_free(tmp_path)
        lease.check()
        threading.Timer(0.2, ledger.kill).start()
        assert lease.is_last_holder(wait_s=20)
    assert not is_free(tmp_path)
    lease.end(wait_s=0)
    assert not lease.is_last_holder(wait_s=0)


def test_end_leaves_the_lease_to_the_process_that_still_holds_it(tmp_path: Path) -> None:
    lease = acquire(tmp_path, "holder")
    with process(JOIN, tmp_path) as ledger:
        lease.end(wait_s=0)
        assert lease.path.exists()
        assert not is_free(tmp_path)
        kill(ledger)
    assert is_free(tmp_path)


def test_nobody_sees_the_lease_free_while_its_holder_asks_whether_it_is_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel drops a shared lock before it grants an exclusive one: here, for a while."""
    lease, flock, answers = acquire(tmp_path, "holder"), fcntl.flock, list[bool]()
    rival = threading.Thread(target=lambda: answers.append(is_free(tmp_path)), daemon=True)

    def slow_flock(descriptor: int, operation: int) -> None:
        if descriptor == lease._lock.fileno() and operation & fcntl.LOCK_EX:
            flock(descriptor, fcntl.LOCK_UN)
            rival.start()
            rival.join(0.2)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", slow_flock)
    assert lease.is_last_holder(wait_s=0)
    rival.join(DEADLINE_S)
    assert answers == [False]
    lease.check()
    monkeypatch.undo()
    lease.end(wait_s=0)


# Children.


# How a child comes about that keeps the open files of its parent. Python knows nothing of a fork
# that C code makes.
FORKS = {
    "os.fork": "os.fork()",
    "C": "ctypes.PyDLL(None).fork()",
    "a pool": "(pool := multiprocessing.get_context('fork').Pool(1))._pool[0].pid",
}
PARENT = """
import ctypes, multiprocessing, os, signal, sys, threading, time
from pathlib import Path
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.lease import Lease, exclusive_lock

folder, how, then = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
lease = Lease.acquire(folder, Owner.here("holder"), Claim(None), wait_s=0)

def hold_lock():
    with exclusive_lock(folder):
        entered.set()
        forked.wait()

entered, forked = threading.Event(), threading.Event()
thread = threading.Thread(target=hold_lock)
thread.start()
entered.wait()
child = eval(how)
if child == 0:
    # Whatever it does on its way out, the lease is its parent's.
    if "os.fork" in how:
        lease.end(wait_s=0)
        assert lease.path.exists()
    time.sleep(60)
if then == "die in the lock":
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
forked.set()
thread.join()
lease.check()
if then == "release":
    lease.release()
print(child, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def parent(folder: Path, how: str, then: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds a lease, and its child; both are killed at the end."""
    driver = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), FORKS[how], then],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    child = int(driver.stdout.readline())
    try:
        yield driver, child
    finally:
        os.kill(child, signal.SIGKILL)  # It fails if the child died before.
        kill(driver)
        driver.stdin.close()
        driver.stdout.close()


@pytest.mark.parametrize("how", FORKS)
def test_a_child_of_a_killed_driver_keeps_nobody_out(tmp_path: Path, how: str) -> None:
    with parent(tmp_path, how, "hold") as (driver, _):
        assert not is_free(tmp_path)
        with process(JOIN, tmp_path) as ledger:
            kill(driver)
            # The ledger may still commit.
            assert not is_free(tmp_path)
            ledger.send_signal(signal.SIGSTOP)
            assert not is_free(tmp_path)
            kill(ledger)
            assert is_free(tmp_path)
        assert live_runs(tmp_path) == {}


@pytest.mark.parametrize("how", FORKS)
def test_a_forked_child_does_not_keep_a_lease_that_was_released(tmp_path: Path, how: str) -> None:
    with parent(tmp_path, how, "release"):
        assert is_free(tmp_path)


def test_a_lock_that_a_dead_process_left_to_its_child_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can tell what the child does, so nobody enters in its place, but nobody hangs."""
    monkeypatch.setattr(lease_module, "_LOCK_WAIT_S", 0.2)
    with parent(tmp_path, "C", "die in the lock") as (driver, _):
        driver.wait()
        with pytest.raises(CheckpointError, match=rf"fuser -v {tmp_path}/lock"):
            acquire(tmp_path, "second")
    assert is_free(tmp_path)
    with parent(tmp_path, "os.fork", "die in the lock") as (driver, _):
        driver.wait()
        assert is_free(tmp_path)


def test_a_lease_with_more_holders_than_it_has_room_for_is_held(tmp_path: Path) -> None:
    with process(HOLD, tmp_path) as driver, process(JOIN, tmp_path):
        with process(JOIN, tmp_path) as third:
            kill(driver)
            kill(third)
        # The ledger's process is alive, whose line the third one has taken.
        assert not is_free(tmp_path)
        assert lease_module._read_claim(tmp_path / "holder.lease") == EVERYTHING
    assert is_free(tmp_path)


@pytest.mark.parametrize("how", ["fork and exec", "posix_spawn"])
def test_a_started_program_does_not_keep_the_lease(tmp_path: Path, how: str) -> None:
    lease = acquire(tmp_path, "holder")
    with contextlib.ExitStack() as stack:
        if how == "posix_spawn":
            spawned = os.posix_spawn("/bin/sleep", ["sleep", "60"], {})
            stack.callback(os.waitpid, spawned, 0)
            stack.callback(os.kill, spawned, signal.SIGKILL)
        else:
            code = "import sys; print(1, flush=True); sys.stdin.read()"
            stack.enter_context(process(code, close_fds=False))
        # As the kernel does for a killed holder: closed without a word.
        lease._lock._close()
        # A spawned program may start a moment before the kernel closes what it must not have.
        deadline = time.monotonic() + DEADLINE_S
        while not is_free(tmp_path):
            assert time.monotonic() < deadline
