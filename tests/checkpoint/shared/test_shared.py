"""A checkpoint in a shared folder and on a real S3 server: leases, fences, what is published."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
from buckets import S3
from pyarrow.fs import LocalFileSystem

from ray_resume import Checkpoint, CheckpointError
from ray_resume.checkpoint.backend import FORMAT_VERSION
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.location import Location
from ray_resume.checkpoint.shared import writer as shared_writer
from ray_resume.checkpoint.shared.backend import SharedBackend
from ray_resume.checkpoint.shared.segments import encode as encode_segment
from ray_resume.checkpoint.shared.segments import fence_name
from ray_resume.core.digests import source_digest
from ray_resume.core.identity import ids_of
from ray_resume.core.planning import Listing, Policies
from ray_resume.core.records import Record, State, encode
from ray_resume.core.shards import ArrayTask
from ray_resume.core.sources import Source, SourceTable
from ray_resume.run.run import MOST_WRITER_FILES, Run
from ray_resume.run.run_plan import RunPlan
from ray_resume.testing import victim_pid
from ray_resume.write.folder import Folder
from ray_resume.write.output import FolderOutput

pytestmark = [pytest.mark.extended, pytest.mark.long]

# Longer than any machine stalls, so that no live process is declared dead.
TTL_S = 60.0
# For the tests that wait until it has passed. If the machine stalled meanwhile, they wait longer.
SHORT_TTLS_S = (3.0, 15.0)
OTHER_HOST = (
    "from ray_resume.checkpoint.shared import scratch\nscratch.boot_id = lambda: 'another host'\n"
)


@pytest.fixture(params=["folder", "s3"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Location:
    # What this host keeps for itself: of an S3 server that is gone it would still be there.
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    if request.param == "folder":
        return Location(str(tmp_path / "ckpt"), shared=True, lease_ttl_s=TTL_S)
    s3: S3 = request.getfixturevalue("s3")
    return Location(s3.uri(f"{tmp_path.name}/ckpt"), lease_ttl_s=TTL_S)


def opened(place: Location) -> SharedBackend:
    storage = place.open()
    assert isinstance(storage, SharedBackend)
    storage.ensure()
    return storage


def claim(*source_ids: str) -> Claim:
    return Claim(frozenset(map(source_digest, source_ids)))


def run(number: int) -> str:
    return f"{number:012x}"


def objects_of(storage: SharedBackend) -> Any:
    return storage._objects


def commit(storage: SharedBackend, number: int, *source_ids: str, sequence: int = 0) -> None:
    """Be a run that completes sources, and ends."""
    lease = storage.acquire(Owner.here(run(number)), claim(*source_ids), wait_s=0)
    ledger, writer = storage.bind_ledger(run(number), lease).open({"sources_total": 7})
    writer.commit(records(number, *source_ids, sequence=sequence))
    writer.close()
    ledger.release()
    lease.end(wait_s=5)


def records(number: int, *source_ids: str, sequence: int = 0) -> list[Record]:
    return [
        Record(source_id, State.COMPLETED, sequence + i, run(number), rows=1)
        for i, source_id in enumerate(source_ids, 1)
    ]


def completed(storage: SharedBackend, own: int = 0xFFF) -> set[str]:
    return {record.source_id for record in storage.committed_by_dead_runs(run(own)).snapshot}


Test = TypeVar("Test", bound=Callable[..., None])


def with_short_ttls(test: Test) -> Test:
    """Run a test with a short TTL, and with a longer one if the machine stalled and it failed.

    A process that got no processor for so long is rightly declared dead.
    """

    @functools.wraps(test)
    def run(place: Location, **given: Any) -> None:
        for ttl_s in SHORT_TTLS_S:
            path = place.path.replace("/ckpt", f"/ckpt-{ttl_s}")
            short = replace(place, path=path, lease_ttl_s=ttl_s)
            with stalls() as longest_s:
                try:
                    test(place=short, **given)
                    return
                except (AssertionError, CheckpointError, pytest.fail.Exception):
                    if ttl_s == SHORT_TTLS_S[-1] or max(longest_s) < ttl_s / 10:
                        raise

    return cast(Test, run)


@contextlib.contextmanager
def stalls() -> Iterator[list[float]]:
    """Measure how long a thread got no processor."""
    longest_s, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            before = time.monotonic()
            time.sleep(0.02)
            longest_s.append(time.monotonic() - before)

    threading.Thread(target=watch, daemon=True).start()
    yield longest_s
    over.set()


def script(place: Location, body: str, *, other_host: bool) -> list[str]:
    """Make a program with a storage ``storage`` at ``place``; another host's, if that is wanted."""
    return [
        sys.executable,
        "-c",
        f"import sys, os, signal, time\n"
        f"from ray_resume.checkpoint.location import Location\n"
        f"from ray_resume.checkpoint.claims import Claim, Owner\n"
        f"{OTHER_HOST if other_host else ''}"
        f"shared, ttl_s = {place.shared}, {place.lease_ttl_s}\n"
        f"storage = Location(sys.argv[1], shared=shared, lease_ttl_s=ttl_s).open()\n"
        f"{body}",
        place.path,
    ]


@pytest.fixture
def started() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def start(command: list[str]) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        processes.append(subprocess.Popen(command, text=True, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# --- Identity, sink, ranks ---


def test_it_is_made_once_and_bound_to_one_sink(place: Location) -> None:
    storage = opened(place)
    assert place.open().identity() == storage.ensure() == storage.identity()
    assert storage.sink() is None
    storage.bind("/out", run(1))
    assert place.open().sink() == "/out"
    lease = storage.acquire(Owner.here(run(2)), claim("a"), wait_s=0)
    with pytest.raises(CheckpointError, match=r"being used for /out by another"):
        storage.bind("/elsewhere", run(3))
    storage.bind("/elsewhere", run(2))
    lease.end(wait_s=0)
    assert place.open().sink() == "/elsewhere"


def test_it_stays_bound_when_it_is_made_again_much_later(tmp_path: Path) -> None:
    """Who was stopped while he made it goes on when others have long been at work."""
    place = Location(str(tmp_path), shared=True)
    late = place.open()
    slow = late._objects = Unanswered(late._objects, "checkpoint.json")
    with pytest.raises(CheckpointError, match="cannot write"):
        late.ensure()
    opened(place).bind("/out", run(1))
    slow.land()
    assert place.open().sink() == "/out"


def test_what_is_not_there_is_told(place: Location) -> None:
    for call in (place.open().identity, Checkpoint(place_of(place)).status):
        with pytest.raises(CheckpointError, match="There is no checkpoint at"):
            call()


def place_of(place: Location) -> Checkpoint:
    return Checkpoint(place.path, shared=place.shared, lease_ttl_s=place.lease_ttl_s)


def test_a_shared_folder_is_known_again(tmp_path: Path) -> None:
    Location(str(tmp_path), shared=True).open().ensure()
    assert isinstance(Location(str(tmp_path)).open(), SharedBackend)


def test_eight_tasks_draw_eight_ranks_at_once(place: Location) -> None:
    opened(place)
    ranks: dict[int, int] = {}

    def draw(index: int) -> None:
        ranks[index] = place.open().rank_of(ArrayTask("array", index, 8))

    threads = [threading.Thread(target=draw, args=(7 * index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ranks.values()) == list(range(8))
    assert all(place.open().rank_of(ArrayTask("array", i, 8)) == rank for i, rank in ranks.items())
    with pytest.raises(CheckpointError, match="task 3 is one more"):
        place.open().rank_of(ArrayTask("array", 3, 8))
    assert not objects_of(opened(place)).list("queue")


# --- Leases ---


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


# --- What is published ---


def test_what_is_committed_is_there_for_everybody_and_ends_up_in_one_object(
    place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_writer, "_FEW_SEGMENTS", 4)
    storage = opened(place)
    lease = storage.acquire(Owner.here(run(1)), Claim(None), wait_s=0)
    ledger, writer = storage.bind_ledger(run(1), lease).open({"sources_total": 20})
    looking = place_of(place)
    for number in range(10):
        writer.commit(records(1, f"s{number}", sequence=number))
        assert looking.status().completed == number + 1
        assert looking.status().live == 1
    names = sorted(objects_of(storage).list(f"runs/{run(1)}"))
    assert len(names) <= 5
    assert any(name.endswith(".whole") for name in names)
    writer.close()
    ledger.release()
    lease.end(wait_s=5)
    # All in one, and up to where it counts.
    assert len(objects_of(storage).list(f"runs/{run(1)}")) == 2
    assert completed(storage) == {f"s{number}" for number in range(10)}
    status = looking.status()
    assert (status.total, status.completed, status.live, status.writers) == (20, 10, 0, 1)


class Unanswered:
    """A storage that gives no answer when something of this name is put; that lands later."""

    def __init__(self, objects: Any, name: str) -> None:
        self._objects = objects
        self._name = name
        self.under_way: list[tuple[str, bytes]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def put(self, name: str, data: bytes) -> None:
        if name.endswith(self._name):
            self.under_way.append((name, data))
            raise CheckpointError(f"cannot write {name}")
        self._objects.put(name, data)

    replace = put

    def land(self) -> None:
        for name, data in self.under_way:
            self._objects.replace(name, data)


@pytest.mark.parametrize("tidy", [True, False])
def test_what_lands_when_its_own_run_has_ended_counts_for_nobody(
    tmp_path: Path, tidy: bool
) -> None:
    """Its ledger got no answer, or was killed, and its driver has removed the files already."""
    storage = opened(Location(str(tmp_path), shared=True, lease_ttl_s=TTL_S))
    lease = storage.acquire(Owner.here(run(1)), Claim(None), wait_s=0)
    slow = Unanswered(objects_of(storage), "3.part")
    binding = replace(storage.bind_ledger(run(1), lease), objects=slow)
    ledger, writer = binding.open({})
    writer.commit(records(1, "a"))
    with pytest.raises(CheckpointError, match="cannot write"):
        writer.commit(records(1, "b", sequence=1))
    # As if it were killed now.
    writer._local.close()
    ledger.release()
    if tidy:
        assert completed(storage, own=1) == {"a"}
    lease.end(wait_s=5)
    slow.land()
    assert completed(storage) == {"a"}


def test_who_does_not_know_what_became_of_a_commit_commits_nothing_more(tmp_path: Path) -> None:
    """The next one would be there without the one before, and nobody could read either."""
    storage = opened(Location(str(tmp_path), shared=True, lease_ttl_s=TTL_S))
    lease = storage.acquire(Owner.here(run(1)), Claim(None), wait_s=0)
    slow = Unanswered(objects_of(storage), "2.part")
    binding = replace(storage.bind_ledger(run(1), lease), objects=slow)
    ledger, writer = binding.open({})
    with pytest.raises(CheckpointError, match="cannot write"):
        writer.commit(records(1, "a"))
    with pytest.raises(CheckpointError, match="does not know whether"):
        writer.commit(records(1, "b", sequence=1))
    writer._local.close()
    ledger.release()
    lease.end(wait_s=5)
    assert completed(storage) == set()


def test_parts_stay_when_somebody_has_put_up_a_fence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of a virtual machine that was paused does not know of it."""
    monkeypatch.setattr(shared_writer, "_FEW_SEGMENTS", 3)
    storage = opened(Location(str(tmp_path), shared=True, lease_ttl_s=TTL_S))
    lease = storage.acquire(Owner.here(run(1)), Claim(None), wait_s=0)
    ledger, writer = storage.bind_ledger(run(1), lease).open({})
    writer.commit(records(1, "a"))
    objects_of(storage).put(f"runs/{run(1)}/{fence_name(run(2), 2)}", b"")
    with pytest.raises(CheckpointError, match=r"another run .* declared it dead"):
        writer.commit(records(1, "b", sequence=1))
    writer._local.close()
    ledger.release()
    lease.end(wait_s=5)
    assert completed(storage) == {"a"}


def test_only_dead_runs_are_relied_on(place: Location) -> None:
    storage = opened(place)
    commit(storage, 1, "a")
    lease = storage.acquire(Owner.here(run(2)), claim("b"), wait_s=0)
    ledger, writer = storage.bind_ledger(run(2), lease).open({})
    writer.commit(records(2, "b"))
    assert completed(opened(place)) == {"a"}
    assert {r.source_id for r in opened(place).snapshot().snapshot} == {"a", "b"}
    writer.close()
    ledger.release()
    lease.end(wait_s=5)
    assert completed(opened(place)) == {"a", "b"}


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "replace"])
def test_damage_is_told_and_nothing_is_skipped(place: Location, damage: str) -> None:
    storage = opened(place)
    commit(storage, 1, "a")
    commit(storage, 2, "b")
    objects = objects_of(storage)
    (name,) = [name for name in objects.list(f"runs/{run(1)}") if "fence" not in name]
    data = objects.get(name)
    objects.delete([name])
    if damage == "remove":
        # A part that others build on.
        objects.put(f"runs/{run(1)}/000000003.part", data)
    elif damage == "replace":
        objects.put(name, b"something else")
    else:
        flipped = bytes([data[0], data[1] ^ 1]) + data[2:]
        objects.put(name, data[:-1] if damage == "cut" else flipped)
    with pytest.raises(CheckpointError, match=rf"runs/{run(1)}.* cannot be read"):
        storage.committed_by_dead_runs(run(9))
    report = place_of(place).check()
    assert not report.ok
    assert any(f"runs/{run(1)}" in problem for problem in report.problems)
    assert report.records == 1


def test_reset_compact_and_check(place: Location) -> None:
    storage = opened(place)
    for number in range(1, 6):
        commit(storage, number, f"s{number}", "again", sequence=2 * number)
    checkpoint = place_of(place)
    assert checkpoint.reset("s1") == 1
    assert {source.source_id for source in checkpoint.sources()} == {
        "again",
        *(f"s{number}" for number in range(2, 6)),
    }
    assert checkpoint.compact() == 6
    assert checkpoint.status().writers == 1
    assert checkpoint.compact() == 0
    assert len(list(checkpoint.sources("completed"))) == 5
    report = checkpoint.check()
    assert report.ok, report
    # What a run that was merged still publishes counts for nobody: the merged one stands for it.
    commit_late(storage, 1)
    assert len(list(checkpoint.sources("completed"))) == 5
    assert storage.committed_by_dead_runs(run(9)).headers.keys() >= {
        run(number) for number in range(1, 6)
    }


def commit_late(storage: SharedBackend, number: int) -> None:
    late = encode_segment({}, encode(records(1, "late")[:1]))
    objects_of(storage).put(f"runs/{run(number)}/000000009.part", late)


MAINTAIN = """
from ray_resume import Checkpoint
from ray_resume.testing import kill_at
checkpoint = Checkpoint(sys.argv[1], lease_ttl_s=3.0)
with kill_at(sys.argv[2], sys.argv[3], after=int(sys.argv[2] == "compact.removing")):
    checkpoint.compact()
"""


@pytest.mark.parametrize("point", ["compact.merged", "compact.removing"])
def test_compaction_dies(
    place: Location, tmp_path: Path, point: str, started: Callable[..., subprocess.Popen[str]]
) -> None:
    storage = opened(place)
    for number in range(1, 4):
        commit(storage, number, f"s{number}")
    folder = str(tmp_path / "faults")
    assert started([*script(place, MAINTAIN, other_host=False), point, folder]).wait() == -9
    checkpoint = place_of(place)
    assert checkpoint.check(), checkpoint.check()
    assert completed(storage) == {"s1", "s2", "s3"}
    assert checkpoint.compact() >= 1
    assert checkpoint.status().writers == 1
    assert completed(storage) == {"s1", "s2", "s3"}


def test_a_local_checkpoint_is_not_taken_for_a_shared_one(place: Location) -> None:
    storage = opened(place)
    identity = {"id": "0" * 8, "layout": None, "format": FORMAT_VERSION}
    objects_of(storage).replace("checkpoint.json", json.dumps(identity).encode())
    with pytest.raises(CheckpointError, match="directory of one host's own"):
        place.open().identity()


@pytest.mark.slow
def test_an_unreachable_storage_is_one_clear_error(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_resume.checkpoint.shared import objects

    monkeypatch.setattr(objects, "_RETRY_DELAYS_S", (0.01,))
    uri = s3.uri("x").replace(str(s3.port), "1")
    with pytest.raises(CheckpointError, match=r"s3://bucket-\w+/x.* fails: cannot read "):
        Checkpoint(uri).status()
    with pytest.raises(CheckpointError, match=r"fails: cannot write"):
        Location(replace(s3, bucket="no-such-bucket").uri("x")).open().ensure()


def test_the_command_line(s3: S3, tmp_path: Path) -> None:
    place = Location(s3.uri(tmp_path.name), lease_ttl_s=TTL_S)
    storage = opened(place)
    storage.bind("s3://bucket/out", run(1))
    commit(storage, 1, "a", "b")

    def command(*arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", "ray_resume", *arguments], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert "secret" not in result.stdout
        return result.stdout

    assert json.loads(command("status", place.path, "--json"))["completed"] == 2
    assert "2 of 7 sources completed" in command("status", place.path)
    assert len(command("sources", place.path).splitlines()) == 2
    assert "1 source forgotten" in command("reset", place.path, "--source", "a")
    assert "Merged 2 files of runs into one" in command("compact", place.path)
    assert "is sound" in command("check", place.path)
    assert len(json.loads(command("sources", place.path, "--json"))) == 1


def test_what_runs_leave_does_not_pile_up(place: Location, tmp_path: Path) -> None:
    storage = opened(place)
    out = Folder(LocalFileSystem(), str(tmp_path / "out"), str(tmp_path / "out"))
    commit(storage, 1, "a")
    for number in range(2, MOST_WRITER_FILES + 2):
        storage.write_whole(run(number), {"purpose": "reset"}, ())
    sources = SourceTable.of([Source("a", "a")])
    plan = RunPlan(
        storage=place.open(),
        listing=Listing(sources, sources, ids_of("file")),
        policies=Policies("ignore", "continue"),
        output=FolderOutput(out, append=False),
        table=None,
        signature="",
    )
    summary = Run(plan).execute(lambda _: None)
    assert (summary.sources_total, summary.sources_skipped) == (1, 1)
    assert len(storage.writers()) == 1
    assert completed(storage) == {"a"}
    assert place_of(place).check(), place_of(place).check()
