"""Leases of runs in one process: which claims exclude each other, and how one is lost."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from local_leases import EVERYTHING, acquire, claim, is_free

from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local import lease as lease_module
from ray_resume.checkpoint.local.lease import Lease, exclusive_lock, known_runs, live_runs
from ray_resume.checkpoint.local.process import this_process
from ray_resume.errors import CheckpointError

pytestmark = pytest.mark.long


def dead_process() -> str:
    """The identity of a process of this host that has died."""
    child = subprocess.Popen(["true"])
    child.wait()
    return this_process().replace(f" {os.getpid()}", f" {child.pid}")


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


def test_end_removes_the_lease_of_a_run_that_is_over(tmp_path: Path) -> None:
    lease = acquire(tmp_path, "holder")
    lease.end(wait_s=0)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
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
