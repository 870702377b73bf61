"""Leases of a shared checkpoint: who may run, who is dead, and who is fenced."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from shared_checkpoint import (
    TTL_S,
    claim,
    commit,
    completed,
    objects_of,
    opened,
    place_of,
    run,
    said,
    script,
    with_short_ttls,
)

from ray_resume import Checkpoint, CheckpointError
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.location import Location
from ray_resume.core.digests import source_digest
from ray_resume.testing import victim_pid

pytestmark = [pytest.mark.extended, pytest.mark.long]


def test_claims_that_meet_exclude_each_other_and_others_coexist(place: Location) -> None:
    storage = opened(place)
    first = storage.acquire(Owner.here(run(1)), claim("a", "b"), wait_s=0)
    second = place.open().acquire(Owner.here(run(2)), claim("c"), wait_s=0)
    for theirs in (claim("b", "d"), Claim(None)):
        with pytest.raises(CheckpointError, match=rf"in use: run {run(1)}.*kill {os.getpid()}"):
            opened(place).acquire(Owner.here(run(3)), theirs, wait_s=0)
    first.check()
    first.end(wait_s=0)
    opened(place).acquire(Owner.here(run(4)), claim("b"), wait_s=0).end(wait_s=0)
    second.end(wait_s=0)
    assert not [name for name in objects_of(storage).list("leases") if ".claim" not in name]


def test_of_disjoint_shards_nobody_reads_the_claims(place: Location) -> None:
    storage = opened(place)
    leases = []
    for index in range(3):
        mine = Claim(source_digest("a") + source_digest("b"), (index, 3))
        leases.append(storage.acquire(Owner.here(run(index)), mine, wait_s=0))
    assert storage._leases._claims == {}
    for theirs in (claim("a"), Claim(source_digest("a"), (1, 2)), Claim(None)):
        with pytest.raises(CheckpointError, match="in use"):
            opened(place).acquire(Owner.here(run(9)), theirs, wait_s=0)
    for lease in leases:
        lease.end(wait_s=0)


def test_who_waits_starts_when_the_other_ends(place: Location) -> None:
    first = opened(place).acquire(Owner.here(run(1)), claim("a"), wait_s=0)
    threading.Timer(0.5, lambda: first.end(wait_s=0)).start()
    before = time.monotonic()
    opened(place).acquire(Owner.here(run(2)), claim("a"), wait_s=60).end(wait_s=0)
    assert 0.4 < time.monotonic() - before < TTL_S / 2


def test_threads_that_all_want_it_get_it_one_after_another(place: Location) -> None:
    opened(place)
    holding: list[int] = []
    most: list[int] = []

    def hold(number: int) -> None:
        lease = opened(place).acquire(Owner.here(run(number)), claim("a"), wait_s=120)
        holding.append(number)
        most.append(len(holding))
        time.sleep(0.05)
        holding.remove(number)
        lease.end(wait_s=0)

    threads = [threading.Thread(target=hold, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 5


HOLD = """
lease = storage.acquire(Owner.here("00000000000a"), Claim(None), wait_s=0)
ledger, writer = storage.bind_ledger("00000000000a", lease).open({})
print("held", flush=True)
sys.stdin.read()
"""


def test_a_killed_run_of_this_host_is_known_to_be_dead(
    place: Location, started: Callable[[list[str]], subprocess.Popen[str]]
) -> None:
    storage = opened(place)
    holder = started(script(place, HOLD, other_host=False))
    assert said(holder) == "held"
    with pytest.raises(CheckpointError, match="in use"):
        storage.acquire(Owner.here(run(1)), claim("a"), wait_s=0.3)
    holder.kill()
    holder.wait()
    before = time.monotonic()
    lease = storage.acquire(Owner.here(run(1)), claim("a"), wait_s=0)
    assert time.monotonic() - before < TTL_S / 2
    storage.committed_by_dead_runs(run(1))
    assert set(objects_of(storage).list("leases")) == {
        f"leases/{run(1)}.{kind}" for kind in ("json", "claim", "driver")
    }
    lease.end(wait_s=0)


@with_short_ttls
def test_a_killed_run_of_another_host_is_dead_when_it_was_silent_for_long(
    place: Location, started: Callable[[list[str]], subprocess.Popen[str]]
) -> None:
    storage, ttl_s = opened(place), place.lease_ttl_s or TTL_S
    holder = started(script(place, HOLD, other_host=True))
    assert said(holder) == "held"
    # As long as it gives signs of life, nobody gets past it.
    with pytest.raises(CheckpointError, match="in use"):
        storage.acquire(Owner.here(run(1)), claim("a"), wait_s=ttl_s * 1.5)
    holder.kill()
    holder.wait()
    before = time.monotonic()
    storage.acquire(Owner.here(run(1)), claim("a"), wait_s=60).end(wait_s=0)
    assert ttl_s * 0.8 < time.monotonic() - before < ttl_s * 4


STOPPED = """
from ray_resume.run.ledger_host import LedgerHost
from ray_resume.run.run_spec import RunSpec
from ray_resume.errors import ResumeError
from ray_resume.core.messages import Message, Seal
from ray_resume.core.sources import Source, SourceTable

run_id = "00000000000a"
lease = storage.acquire(Owner.here(run_id), Claim(None), wait_s=0)
sources = SourceTable.of(Source(f"s{i}", None) for i in range(3))
binding = storage.bind_ledger(run_id, lease)
spec = RunSpec(run_id, binding, sources, {}, 3, 0, "", {"sources_total": 3})
host = LedgerHost(spec)
lease.check()
host.begin_pass(1)
host.apply(Message(run_id, 1, (Seal(0, 0),)))
host.flush()
print("committed", flush=True)
host.apply(Message(run_id, 1, (Seal(1, 0),)))
os.kill(os.getpid(), signal.SIGSTOP)
try:
    print("committed again", host.flush(), flush=True)
except ResumeError as error:
    print("refused:", error, flush=True)
try:
    host.apply(Message(run_id, 1, (Seal(2, 0),)))
except ResumeError as error:
    print("refused too", flush=True)
try:
    lease.check()
except ResumeError as error:
    print("cleans nothing", flush=True)
"""


@pytest.mark.parametrize("other_host", [False, True])
@with_short_ttls
def test_an_owner_that_wakes_up_after_its_lease_is_gone_commits_nothing(
    place: Location,
    started: Callable[[list[str]], subprocess.Popen[str]],
    other_host: bool,
) -> None:
    storage = opened(place)
    owner = started(script(place, STOPPED, other_host=other_host))
    assert said(owner) == "committed"
    os.waitid(os.P_PID, owner.pid, os.WSTOPPED | os.WNOWAIT)
    lease = storage.acquire(Owner.here(run(1)), claim("s0", "s1", "s2"), wait_s=60)
    assert completed(storage, own=1) == {"s0"}
    owner.send_signal(signal.SIGCONT)
    assert said(owner).startswith("refused: This run could not write a heartbeat")
    assert said(owner) == "refused too"
    assert said(owner) == "cleans nothing"
    owner.wait()
    assert completed(storage, own=1) == {"s0"}
    lease.end(wait_s=0)
    assert completed(opened(place)) == {"s0"}


FENCE = """
from ray_resume.testing import kill_at
lease = storage.acquire(Owner.here("00000000000b"), Claim(None), wait_s=0)
with kill_at("shared.fenced", sys.argv[2]):
    storage.committed_by_dead_runs("00000000000b")
"""


def test_a_successor_that_dies_when_it_has_fenced(
    place: Location, tmp_path: Path, started: Callable[[list[str]], subprocess.Popen[str]]
) -> None:
    storage = opened(place)
    commit(storage, 1, "a", "b")
    holder = started(script(place, HOLD, other_host=False))
    assert said(holder) == "held"
    holder.kill()
    holder.wait()
    successor = started([*script(place, FENCE, other_host=False), str(tmp_path / "faults")])
    assert successor.wait() == -signal.SIGKILL
    assert victim_pid("shared.fenced", tmp_path / "faults") == successor.pid
    assert completed(storage) == {"a", "b"}
    assert Checkpoint(place_of(place)).check(), Checkpoint(place_of(place)).check()
    # Both dead runs are fenced now, and have no lease.
    assert not [n for n in objects_of(storage).list("leases") if n.endswith(".json")]
