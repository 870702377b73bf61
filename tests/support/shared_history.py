"""A history of runs on one shared checkpoint, in a `world`.

Each run takes its lease, reads what is done, writes a file for each of its pending sources,
commits, and cleans up, as `run` and `ledger_host` do. Driver and ledger are two processes, which
stop and die each by itself, or with their host. Storages fail, before or after the effect, and what
was under way lands later. Compactions and resets come between.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snapshots import whole_files
from world import World, WorldLock, WorldObjects

from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.contents import Contents
from ray_resume.checkpoint.resets import reset_records
from ray_resume.checkpoint.shared import mutex
from ray_resume.checkpoint.shared.backend import SharedBackend
from ray_resume.checkpoint.shared.heartbeat import Heartbeat
from ray_resume.checkpoint.shared.leases import SharedLease
from ray_resume.checkpoint.shared.writer import SharedWriter
from ray_resume.core.digests import source_digest
from ray_resume.core.records import Record, State, encode
from ray_resume.errors import CheckpointError

TTL_S = 6.0
SOURCES = 6

chance = random.Random()
"""What is drawn at random; each history sets it anew."""


class NoLock:
    path = Path(os.devnull)

    def is_last_holder(self, *, wait_s: float) -> bool:
        return True

    def end(self, *, wait_s: float) -> None: ...

    def release(self) -> None: ...


class WorldHeart(Heartbeat):
    """A heart that beats in the world."""

    world: World

    def start(self) -> None:
        world, body = self.world, self.world.current()

        def beat() -> None:
            while not body.over and self.is_alive():
                world.sleep(TTL_S / 6)
                with contextlib.suppress(CheckpointError):
                    self.beat()
                    self._also()

        world.spawn(f"{body.name}'s heart", beat, body=body)


@dataclass
class LocalFile:
    """What LMDB does, in memory."""

    path: Path = Path("nowhere")
    stored: list[bytes] = field(default_factory=list)

    def append(self, blocks: Sequence[bytes]) -> None:
        self.stored += blocks

    def blocks(self) -> list[bytes]:
        return self.stored

    def close(self) -> None: ...


class Ledger:
    """The ledger of a run, in a process that stops and dies by itself, as `ledger_actor` is."""

    def __init__(self, history: History, run_id: str, sequence: int) -> None:
        self.run_id = run_id
        self._history = history
        self._driver = history.world.current()
        self._sequence = sequence
        self._asked: list[tuple[str, dict[str, str]]] = []
        self._answers: list[CheckpointError | None] = []
        self._process = history.world.spawn(f"ledger {run_id}", self._work, host=self._driver)
        history.world.spawn(f"end of ledger {run_id}", self._end)

    def ask(self, what: str, files: dict[str, str] | None = None) -> None:
        """Have it done in the ledger's process, and wait for it.

        Raises:
            CheckpointError: what was raised there; or its process died.
        """
        self._asked.append((what, files or {}))
        while not self._answers:
            if self._process.is_dead() or self._process.over:
                raise CheckpointError("the ledger died")
            self._history.world.sleep(0.05)
        if (error := self._answers.pop(0)) is not None:
            raise error

    def kill(self) -> None:
        self._process.dead = True

    def _end(self) -> None:
        """Ray ends the ledger of a driver that died, some time after that."""
        while not (self._driver.over or self._driver.is_dead() or self._process.over):
            self._history.world.sleep(0.5)
        self._history.world.sleep(self._history.world.random.uniform(0, 2 * TTL_S))
        self.kill()

    def _work(self) -> None:
        world, objects = self._history.world, self._history.objects
        lock: Any = NoLock()
        while True:
            while not self._asked:
                world.sleep(0.05)
            what, files = self._asked.pop(0)
            error = None
            try:
                if what == "open":
                    heart = self._history.heart(f"leases/{self.run_id}.ledger")
                    held = SharedLease.join(objects, self.run_id, heart, lock)
                    local: Any = LocalFile()
                    writer = SharedWriter(objects, self.run_id, {}, held, local)
                elif what == "commit":
                    held.check()
                    self._commit(writer, files)
                else:
                    writer.close()
                    held.release()
            except CheckpointError as raised:
                error = raised
            self._answers.append(error)
            if what == "close":
                return

    def _commit(self, writer: SharedWriter, files: dict[str, str]) -> None:
        history, records = self._history, []
        for source, file in files.items():
            self._sequence += 1
            records.append(
                Record(
                    source,
                    State.COMPLETED,
                    self._sequence,
                    self.run_id,
                    rows=1,
                    parts=whole_files(file),
                )
            )
        writer.commit(records)
        for source in files:
            # Nobody may do again what somebody was told is done.
            if source in history.acknowledged:
                other = history.acknowledged[source]
                history.faults.append(f"{source} of {other} again by {self.run_id}")
            history.acknowledged[source] = self.run_id
        history.world.say(f"has committed {list(files)}")


class History:
    """A world with one checkpoint, and what its runs believe."""

    def __init__(self, seed: int, *, errors: float = 0.0, **faults: Any) -> None:
        chance.seed(seed)
        mutex._choices = itertools.count(1)
        self.world = World(seed, longest_s=3 * TTL_S, **faults)
        latest_s = 3 * TTL_S if errors else 0.0
        self.objects = WorldObjects(self.world, errors=errors, latest_s=latest_s)
        self.acknowledged: dict[str, str] = {}
        self.faults: list[str] = []
        self._runs = 0

    def checkpoint(self) -> SharedBackend:
        checkpoint = SharedBackend(
            self.objects,
            ttl_s=TTL_S,
            publish_interval_s=1,
            scratch_folder=Path(os.devnull).parent,
            clock=self.world.clock,
            sleep=self.world.sleep,
        )
        checkpoint._heart = lambda name: self.heart(  # type: ignore[method-assign]
            name, also=checkpoint._leases.scan
        )
        return checkpoint

    def heart(self, name: str, **options: Any) -> Heartbeat:
        kind = type("Heartbeat", (WorldHeart,), {"world": self.world})
        heart: Heartbeat = kind(self.objects, name, ttl_s=TTL_S, clock=self.world.clock, **options)
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
        claim = Claim(frozenset(map(source_digest, sources)))
        owner = Owner(run_id, "host", 1, 0.0)
        lease = checkpoint.acquire(owner, claim, wait_s=20 * TTL_S)
        try:
            world.say("has its lease")
            names = self.objects.list("out")
            contents = checkpoint.committed_by_dead_runs(run_id)
            done = [r for r in contents.snapshot if r.state is State.COMPLETED]
            for record in done:
                if record.source_id in sources and f"out/{record.files[0]}" not in names:
                    self.faults.append(f"{run_id} misses {record.files[0]}")
            pending = [s for s in sources if s not in {r.source_id for r in done}]
            if not pending:
                self._remove_leftovers(contents, run_id)
                return
            ledger = Ledger(self, run_id, contents.snapshot.highest_sequence())
            try:
                self._passes(ledger, lease, pending)
            finally:
                ledger.kill()
                with contextlib.suppress(CheckpointError):
                    lease.check()
                    self._remove_leftovers(checkpoint.committed_by_dead_runs(run_id), run_id)
        finally:
            lease.end(wait_s=0)
        world.say("has ended")

    def _passes(self, ledger: Ledger, lease: SharedLease, pending: list[str]) -> None:
        ledger.ask("open")
        lease.check()
        try:
            while pending:
                some = pending[: self.world.random.randrange(1, 3)]
                files = {}
                for source in some:
                    files[source] = f"{ledger.run_id}-{source}"
                    self.objects.put(f"out/{files[source]}", b"rows")
                ledger.ask("commit", files)
                pending = pending[len(some) :]
        finally:
            ledger.ask("close")

    def _remove_leftovers(self, contents: Contents, run_id: str) -> None:
        listed = {file for record in contents.snapshot for file in record.files}
        for name in self.objects.list("out"):
            file = name.removeprefix("out/")
            if file.partition("-")[0] in contents.dead_runs | {run_id} and file not in listed:
                self.world.say(f"removes {file}")
                self.objects.delete([name])

    def reset(self, run_id: str, sources: list[str]) -> None:
        """As `checkpoint` does it."""
        checkpoint = self.checkpoint()
        try:
            owner = Owner(run_id, "host", 1, 0.0)
            lease = checkpoint.acquire(owner, Claim(None), wait_s=5 * TTL_S)
            try:
                snapshot = checkpoint.committed_by_dead_runs(run_id).snapshot
                records = [r for r in snapshot if r.source_id in sources]
                for source in sources:
                    # Whether it counts is not known, if it does not come to an end.
                    self.acknowledged.pop(source, None)
                resets = reset_records(records, run_id, snapshot.highest_sequence())
                checkpoint.write_whole(run_id, {}, encode(resets))
                lease.check()
                self.world.say(f"has reset {sources}")
            finally:
                lease.end(wait_s=0)
        except CheckpointError as error:
            self.world.say(f"does not reset: {error}")

    def compact(self, run_id: str, _: list[str]) -> None:
        """As `compaction` does it."""
        from ray_resume.checkpoint.compaction import compact

        try:
            compact(self.checkpoint(), lease_wait_s=5 * TTL_S)
        except CheckpointError as error:
            self.world.say(f"does not compact: {error}")

    def check(self) -> None:
        """When all is over, a last run without faults finds everything, and finishes."""
        assert not self.faults, self.faults
        for last in (False, True):
            self.world._deaths = self.world._stops = self.objects._errors = 0.0
            before = dict(self.acknowledged)
            self.start([f"s{i}" for i in range(SOURCES)])
            self.world.run()
            assert not self.faults, self.faults
            if last:
                assert self.acknowledged == before, "a finished job was done again"
        found: list[Record] = []
        self.world.spawn("auditor", lambda: found.extend(self.checkpoint().snapshot().snapshot))
        self.world.run()
        assert {r.source_id for r in found} == {f"s{i}" for i in range(SOURCES)}
        listed = sorted(file for record in found for file in record.files)
        assert len(listed) == SOURCES
        there = sorted(name[4:] for name in self.world.objects if name.startswith("out/"))
        assert there == listed
        for record in found:
            assert self.acknowledged.get(record.source_id, record.run_id) == record.run_id
