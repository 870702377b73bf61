"""Leases: between threads, processes, dead drivers and stopped ones."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local import lease as lease_module
from ray_resume.checkpoint.local.lease import Lease, exclusive_lock, known_runs, live_runs
from ray_resume.checkpoint.local.process import this_process
from ray_resume.core.digests import source_digest
from ray_resume.errors import CheckpointError

pytestmark = pytest.mark.long

EVERYTHING = Claim(None)
DEADLINE_S = 20.0


def claim(*source_ids: str) -> Claim:
    return Claim(frozenset(map(source_digest, source_ids)))


def acquire(
    directory: Path, run_id: str, what: Claim = EVERYTHING, *, wait_s: float = 0.0
) -> Lease:
    return Lease.acquire(directory, Owner.here(run_id), what, wait_s=wait_s)


def is_free(directory: Path, what: Claim = EVERYTHING) -> bool:
    """Say whether a run with this claim could start now."""
    try:
        acquire(directory, "probe", what).end(wait_s=0)
    except CheckpointError:
        return False
    return True


def dead_process() -> str:
    """The identity of a process of this host that has died."""
    child = subprocess.Popen(["true"])
    child.wait()
    return this_process().replace(f" {os.getpid()}", f" {child.pid}")


@contextlib.contextmanager
def process(code: str, *args: object, close_fds: bool = True) -> Iterator[subprocess.Popen[str]]:
    """A process that has run ``code`` up to its first line of output, and is killed at the end."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        close_fds=close_fds,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    watchdog = threading.Timer(DEADLINE_S, child.kill)
    watchdog.start()
    try:
        assert child.stdout.readline(), "it did not get there"
        yield child
    finally:
        watchdog.cancel()
        child.kill()
        child.wait()
        child.stdin.close()  # Ends its children too.
        child.stdout.close()


def kill(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()


HOLD = """
import sys
from pathlib import Path
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.lease import Lease

lease = Lease.acquire(Path(sys.argv[1]), Owner.here("holder"), Claim(None), wait_s=0)
print("held", flush=True)
sys.stdin.read()
"""

JOIN = """
import sys
from pathlib import Path
from ray_resume.checkpoint.local.lease import Lease

lease = Lease.join(Path(sys.argv[1]) / "holder.lease")
print("joined", flush=True)
sys.stdin.read()
"""


# Claims.


@pytest.mark.parametrize(
    ("one", "other", "met"),
    [
        (claim("a"), claim("b"), False),
        (claim("a", "b"), claim("b", "c"), True),
        (claim("a"), claim(), False),
        (EVERYTHING, claim("a"), True),
        (claim("a"), EVERYTHING, True),
        (EVERYTHING, EVERYTHING, True),
    ],
)
def test_claims_that_meet_exclude_each_other_and_others_coexist(
    tmp_path: Path, one: Claim, other: Claim, met: bool
) -> None:
    assert one.overlaps(other) == met
    first = acquire(tmp_path, "first", one)
    if met:
        with pytest.raises(CheckpointError):
            acquire(tmp_path, "second", other)
        assert set(live_runs(tmp_path)) == {"first"}
    else:
        second = acquire(tmp_path, "second", other)
        assert set(live_runs(tmp_path)) == {"first", "second"}
        second.check()
        second.end(wait_s=0)
    first.check()
    first.end(wait_s=0)
    assert live_runs(tmp_path) == {}


def test_a_refusal_names_the_run_and_what_to_do(tmp_path: Path) -> None:
    lease = acquire(tmp_path, "abc123")
    with pytest.raises(CheckpointError) as caught:
        acquire(tmp_path, "second")
    for part in ("abc123", socket.gethostname(), f"kill {os.getpid()}", str(tmp_path)):
        assert part in str(caught.value)
    lease.end(wait_s=0)


def test_a_refused_run_has_waited(tmp_path: Path) -> None:
    lease = acquire(tmp_path, "first")
    began = time.monotonic()
    with pytest.raises(CheckpointError):
        acquire(tmp_path, "second", wait_s=0.3)
    assert time.monotonic() - began >= 0.3
    lease.end(wait_s=0)


def test_a_waiting_run_starts_when_the_other_ends(tmp_path: Path) -> None:
    lease = acquire(tmp_path, "first")
    threading.Timer(0.2, lambda: lease.end(wait_s=0)).start()
    second = acquire(tmp_path, "second", wait_s=20)
    assert set(live_runs(tmp_path)) == {"second"}
    second.end(wait_s=0)


def test_one_run_id_has_one_lease(tmp_path: Path) -> None:
    lease = acquire(tmp_path, "first", claim("a"))
    with pytest.raises(CheckpointError):
        acquire(tmp_path, "first", claim("b"))
    lease.check()
    lease.end(wait_s=0)


def test_a_missing_directory_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must be a directory"):
        acquire(tmp_path / "missing", "first")


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    holding, most, faults = 0, 0, list[BaseException]()
    counting = threading.Lock()

    def work(number: int) -> None:
        nonlocal holding, most
        try:
            for turn in range(5):
                lease = acquire(tmp_path, f"{number}-{turn}", claim("a", str(number)), wait_s=20)
                with counting:
                    holding += 1
                    most = max(most, holding)
                lease.check()
                with counting:
                    holding -= 1
                lease.end(wait_s=0)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=[n], daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not faults
    assert (holding, most) == (0, 1)
    assert not list(tmp_path.glob("*.lease"))


def test_a_rival_that_ends_while_it_is_looked_at_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rival = acquire(tmp_path, "rival")
    look = lease_module._read_claim

    def end_then_look(path: Path) -> Claim:
        monkeypatch.undo()
        rival.path.unlink()
        rival.release()
        return look(path)

    monkeypatch.setattr(lease_module, "_read_claim", end_then_look)
    acquire(tmp_path, "second").end(wait_s=0)


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


def test_end_removes_the_lease_of_a_run_that_is_over(tmp_path: Path) -> None:
    lease = acquire(tmp_path, "holder")
    lease.end(wait_s=0)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    lease.end(wait_s=0)


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


# Losing it.


def test_check_notices_a_lease_that_was_removed(tmp_path: Path) -> None:
    lease = acquire(tmp_path, "holder")
    lease.check()
    lease.path.unlink()
    with pytest.raises(CheckpointError, match="lost"):
        lease.check()
    assert is_free(tmp_path)
    lease.end(wait_s=0)


def test_check_notices_a_lease_that_was_replaced_and_end_leaves_that_one(tmp_path: Path) -> None:
    lease = acquire(tmp_path, "holder")
    copy = lease.path.read_bytes()
    lease.path.unlink()
    lease.path.write_bytes(copy)
    with pytest.raises(CheckpointError, match="lost"):
        lease.check()
    lease.end(wait_s=0)
    assert lease.path.exists()


def test_a_released_lease_does_not_pass_the_check(tmp_path: Path) -> None:
    lease = acquire(tmp_path, "holder")
    lease.release()
    lease.release()
    with pytest.raises(CheckpointError):
        lease.check()
    assert is_free(tmp_path)


@pytest.mark.parametrize("cut", ["nothing", "owner", "word", "digests"])
def test_a_lease_whose_run_was_killed_while_writing_it_is_in_nobodys_way(
    tmp_path: Path, cut: str
) -> None:
    whole = acquire(tmp_path, "whole", claim("a", "b"))
    content = whole.path.read_bytes()
    whole.end(wait_s=0)
    ends = {
        "nothing": 0,
        "owner": 20,
        "word": content.index(b"sources") + 3,
        "digests": len(content) - 10,
    }
    partial = tmp_path / "0123456789ab.lease"
    partial.write_bytes(content[: ends[cut]])
    assert live_runs(tmp_path) == {}
    # And if somebody holds it all the same, it stands in the way under its name.
    with partial.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert list(live_runs(tmp_path)) == ["0123456789ab"]
        with pytest.raises(
            CheckpointError, match="whole" if cut in ("word", "digests") else "0123"
        ):
            acquire(tmp_path, "second", claim("a", "b"))
    assert is_free(tmp_path)


def test_files_of_others_that_are_called_like_leases_stay(tmp_path: Path) -> None:
    for content in (b"", b"mine\n", b'{"run_id": "x"}\n'):
        (tmp_path / "dhcp.lease").write_bytes(content)
        assert known_runs(tmp_path) == ({}, {})
        acquire(tmp_path, "holder", claim("a")).end(wait_s=0)
        assert (tmp_path / "dhcp.lease").read_bytes() == content


def test_the_file_says_who_holds_it(tmp_path: Path) -> None:
    lease = acquire(tmp_path, "holder", claim("a"))
    first_line = lease.path.read_bytes().split(b"\n")[0]
    owner = json.loads(first_line)
    assert (owner["run_id"], owner["host"], owner["pid"]) == (
        "holder",
        socket.gethostname(),
        os.getpid(),
    )
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


def test_whoever_is_not_known_to_be_dead_holds_its_lease(tmp_path: Path) -> None:
    """The lock decides if a lease does not name its holders, or they cannot be seen from here."""
    lease = acquire(tmp_path, "holder")
    head, _, rest = lease.path.read_bytes().partition(b"\n")
    claimed = rest[2 * 97 :]
    dead, alive = dead_process(), this_process()
    where, _, number = alive.rpartition(" ")
    for holders, free in [
        ([dead], True),
        ([dead, dead], True),
        ([dead, alive], False),
        ([alive, dead], False),
        ([dead, "?"], False),
        (["?", dead], False),
        (["", dead], False),
        ([""], False),
        # Another boot or host, and another container.
        ([f"f{dead}"], False),
        ([dead.replace("pid:[", "pid:[1")], False),
    ]:
        lines = b"".join(lease_module._holder_lines(*holders))
        lease.path.write_bytes(head + b"\n" + lines + claimed)
        assert ("holder" not in live_runs(tmp_path)) == free, holders
    for damaged in (lines[1:], lines[:-1], lines[:97], b"\n\n", b""):
        lease.path.write_bytes(head + b"\n" + damaged + claimed)
        assert "holder" in live_runs(tmp_path), damaged
    assert int(number) == os.getpid()
    assert "pid:[" in where
    lease.release()


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


def test_the_exclusive_lock_excludes(tmp_path: Path) -> None:
    inside = threading.Event()

    def enter() -> None:
        with exclusive_lock(tmp_path):
            inside.set()

    with exclusive_lock(tmp_path):
        entering = threading.Thread(target=enter, daemon=True)
        entering.start()
        assert not inside.wait(0.1)
    assert inside.wait(20)
    entering.join(20)


def test_a_claim_that_is_half_written_keeps_everybody_out(tmp_path: Path) -> None:
    """As a process leaves it that is stopped while it writes: it may claim anything."""
    lease = Lease.acquire(tmp_path, Owner.here("a"), claim("x"), wait_s=0)
    lease.path.write_bytes(lease.path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="in use"):
        Lease.acquire(tmp_path, Owner.here("b"), claim("y"), wait_s=0)
    lease.end(wait_s=0)
