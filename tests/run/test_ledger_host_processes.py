"""The ledger's host in a process of its own, stopped while its driver dies."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from children import DEADLINE_S, process
from store_files import records_in

from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.errors import CheckpointError

pytestmark = pytest.mark.long

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
print("stops", flush=True)
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
def stopped_host_of_a_killed_driver(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A host that was stopped between a completion and its commit, and outlived its driver."""
    LocalBackend(path).ensure()
    with process(DRIVER, path) as driver, process(HOST, path) as host:
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
