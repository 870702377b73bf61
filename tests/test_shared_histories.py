"""Many runs on one shared checkpoint, with deaths and stops at any moment: nothing is lost.

The shipped code of `shared`, `bakery`, `heartbeat` and `segment` runs in a `world`; only Ray, LMDB
and the kernel's locks are left out. Each run takes its lease, reads what is done, writes a file
for each of its pending sources, commits, and cleans up, as `run` and `actor` do it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from world import World, WorldLock, WorldObjects

from ray_resume import segment, shared
from ray_resume.errors import CheckpointError
from ray_resume.heartbeat import Heart
from ray_resume.lease import Claim, Lease, Owner
from ray_resume.record import Record, State, block_of, digest
from ray_resume.shared import SharedCheckpoint, SharedLease, SharedWriter

TTL_S = 6.0
SOURCES = 6


@pytest.fixture(autouse=True)
def _no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process is on a host of its own: no lock proves anything."""
    monkeypatch.setattr(shared, "_boot", lambda: None)
    monkeypatch.setattr(Lease, "hold", classmethod(lambda cls, directory, owner: NoLock()))
    monkeypatch.setattr(shared, "_FEW_PARTS", 3)


class NoLock:
    path = Path(os.devnull)

    def alone(self, *, wait_s: float) -> bool:
        return True

    def end(self, *, wait_s: float) -> None: ...

    def release(self) -> None: ...


class WorldHeart(Heart):
    """A heart that beats in the world."""

    world: World

    def start(self) -> None:
        world, body = self.world, self.world.current()

        def beat() -> None:
            while not body.over and self.is_alive():
                world.sleep(TTL_S / 6)
                self.beat()
                self._also()

        world.spawn(f"{body.name}'s heart", beat, body=body)


@dataclass
class LocalFile:
    """What LMDB does, in memory."""

    path: Path = Path("nowhere")
    stored: list[bytes] = field(default_factory=list)

    def commit_encoded(self, stored: Sequence[bytes]) -> None:
        self.stored += stored

    def blocks(self) -> list[bytes]:
        return [block_of(self.stored)]

    def close(self) -> None: ...


class History:
    """A world with one checkpoint, and what its runs believe."""

    def __init__(self, seed: int, **faults: Any) -> None:
        self.world = World(seed, longest_s=3 * TTL_S, **faults)
        self.objects = WorldObjects(self.world)
        self.acknowledged: dict[str, str] = {}
        self.faults: list[str] = []
        self._runs = 0

    def checkpoint(self) -> SharedCheckpoint:
        checkpoint = SharedCheckpoint(
            self.objects,
            uri="world",
            ttl_s=TTL_S,
            publish_interval_s=1,
            scratch=Path(os.devnull).parent,
            clock=self.world.clock,
            sleep=self.world.sleep,
        )
        checkpoint._heart = lambda name: self.heart(  # type: ignore[method-assign]
            name, also=checkpoint._look_at_leases
        )
        return checkpoint

    def heart(self, name: str, **options: Any) -> Heart:
        kind = type("Heart", (WorldHeart,), {"world": self.world})
        heart: Heart = kind(self.objects, name, ttl_s=TTL_S, clock=self.world.clock, **options)
        heart._beating = WorldLock(self.world)  # type: ignore[assignment]
        return heart

    def start(self, sources: list[str], *, work: Callable[..., None] | None = None) -> None:
        self._runs += 1
        run_id = f"{self._runs:012x}"
        work = work or self.work
        self.world.spawn(f"run {run_id}", lambda: work(run_id, sources))

    def work(self, run_id: str, sources: list[str]) -> None:
        try:
            self._work(run_id, sources)
        except CheckpointError as error:
            self.world.say(f"gives up: {error}")

    def _work(self, run_id: str, sources: list[str]) -> None:
        world, checkpoint = self.world, self.checkpoint()
        checkpoint.ensure()
        claim = Claim(frozenset(map(digest, sources)))
        owner = Owner(run_id, "host", 1, 0.0)
        lease = checkpoint.acquire(owner, claim, wait_s=20 * TTL_S)
        world.say("has its lease")
        contents = checkpoint.settled(run_id)
        done = {r.source_id for r in contents.union if r.state is State.COMPLETED}
        sequence = contents.union.highest_sequence()
        heart, lock, local = self.heart(f"leases/{run_id}.ledger"), NoLock(), LocalFile()
        ledger_lease = SharedLease.join(self.objects, run_id, heart, lock)  # type: ignore[arg-type]
        lease.check()
        writer = SharedWriter(self.objects, run_id, {}, ledger_lease, local)  # type: ignore[arg-type]
        pending = [source for source in sources if source not in done]
        while pending:
            some = pending[: world.random.randrange(1, 3)]
            records = []
            for source in some:
                sequence += 1
                file = f"{run_id}-{source}"
                self.objects.put(f"out/{file}", b"rows")
                records.append(
                    Record(source, State.COMPLETED, sequence, run_id, rows=1, files=(file,))
                )
            ledger_lease.check()
            writer.commit(records)
            for source in some:
                # Nobody may do again what somebody was told is done.
                if source in self.acknowledged:
                    self.faults.append(f"{source} of {self.acknowledged[source]} again by {run_id}")
                self.acknowledged[source] = run_id
            world.say(f"has committed {some}")
            pending = pending[len(some) :]
        writer.close()
        ledger_lease.release()
        self._clean_up(checkpoint, lease, run_id)
        lease.end(wait_s=0)
        world.say("has ended")

    def _clean_up(self, checkpoint: SharedCheckpoint, lease: SharedLease, run_id: str) -> None:
        lease.check()
        contents = checkpoint.settled(run_id)
        listed = {file for record in contents.union for file in record.files}
        for name in self.objects.list("out"):
            file = name.removeprefix("out/")
            if file.partition("-")[0] in contents.dead_runs | {run_id} and file not in listed:
                self.world.say(f"removes {file}")
                self.objects.delete([name])

    def compact(self, run_id: str, _: list[str]) -> None:
        """As `compaction` does it."""
        from ray_resume.compaction import compact

        try:
            compact(self.checkpoint(), lease_wait_s=5 * TTL_S)
        except CheckpointError as error:
            self.world.say(f"does not compact: {error}")

    def check(self) -> None:
        """When all is over, a last run without faults finds everything, and finishes."""
        assert not self.faults, self.faults
        for last in (False, True):
            self.world._deaths = self.world._stops = 0.0
            before = dict(self.acknowledged)
            self.start([f"s{i}" for i in range(SOURCES)])
            self.world.run()
            assert not self.faults, self.faults
            if last:
                assert self.acknowledged == before, "a finished job was done again"
        found: list[Record] = []
        self.world.spawn("auditor", lambda: found.extend(self.checkpoint().everything().union))
        self.world.run()
        assert {r.source_id for r in found} == {f"s{i}" for i in range(SOURCES)}
        listed = sorted(file for record in found for file in record.files)
        assert len(listed) == SOURCES
        there = sorted(name[4:] for name in self.world.objects if name.startswith("out/"))
        assert there == listed
        for record in found:
            assert self.acknowledged.get(record.source_id, record.run_id) == record.run_id


def run_history(seed: int, **faults: Any) -> History:
    history = History(seed, **faults)
    choose = history.world.random
    everything = [f"s{i}" for i in range(SOURCES)]
    for _ in range(choose.randrange(2, 6)):
        if choose.random() < 0.2:
            history.start([], work=history.compact)
            continue
        kind = choose.random()
        if kind < 0.4:
            sources = everything
        elif kind < 0.8:
            half = choose.randrange(2)
            sources = everything[half::2]
        else:
            sources = choose.sample(everything, choose.randrange(1, SOURCES))
        history.start(sources)
    history.world.run()
    return history


@pytest.mark.parametrize(
    ("deaths", "stops", "seeds"),
    [(0, 0, 10), (0.01, 0, 40), (0, 0.01, 60), (0.005, 0.01, 60)],
)
def test_what_was_committed_is_there_once(deaths: float, stops: float, seeds: int) -> None:
    for seed in range(seeds):
        history = run_history(seed, deaths=deaths, stops=stops)
        try:
            history.check()
        except AssertionError:
            print(seed, *history.world.log, sep="\n")
            raise


def zombie(seed: int) -> History:
    """Let a run be stopped while it publishes, and go on when its successor has cleaned up."""
    history = History(seed)
    everything = [f"s{i}" for i in range(SOURCES)]
    history.objects.stops["runs/000000000001/000000002.part"] = 20 * TTL_S
    history.start(everything)
    history.world.run(until=lambda: any(name.startswith("out/") for name in history.world.objects))
    history.start(everything)
    history.world.run()
    return history


def test_what_a_dead_run_still_publishes_counts_for_nobody() -> None:
    for seed in range(10):
        history = zombie(seed)
        assert set(history.acknowledged.values()) == {f"{2:012x}"}
        assert "runs/000000000001/000000002.part" in history.world.objects
        history.check()


def test_a_successor_without_fences_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its predecessor's files are gone, and its late records would list them."""
    monkeypatch.setattr(
        shared, "accepted", lambda names: segment.accepted([n for n in names if "fence" not in n])
    )
    history = zombie(0)
    with pytest.raises(AssertionError):
        history.check()


def test_publishing_without_confirming_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was stopped while he published must not call it committed."""
    monkeypatch.setattr(SharedLease, "confirm", lambda _: None)
    with pytest.raises(AssertionError, match=r"\bagain by\b"):
        zombie(0).check()


def test_a_lease_without_its_turn_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that look at once and then take would not see each other."""
    monkeypatch.setattr(
        SharedCheckpoint, "_in_turn", lambda self, who, act, undo=None: act(Unhurried())
    )
    with pytest.raises((AssertionError, CheckpointError)):
        check_all(range(300))


def check_all(seeds: range) -> None:
    for seed in seeds:
        run_history(seed).check()


class Unhurried:
    def confirm(self) -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize(("deaths", "stops"), [(0.01, 0), (0, 0.01), (0.005, 0.01), (0.002, 0.03)])
def test_many_histories(deaths: float, stops: float) -> None:
    for seed in range(10_000, 13_000):
        history = run_history(seed, deaths=deaths, stops=stops)
        try:
            history.check()
        except AssertionError:
            print(seed, *history.world.log, sep="\n")
            raise
