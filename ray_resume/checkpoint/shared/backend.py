"""A checkpoint in a storage that hosts share: an object store, or a network file system.

Beside what both kinds of checkpoint keep (see `checkpoint.backend`), the storage has::

    queue/...                     processes that want to take or look at leases (see `mutex`)
    leases/<run>.json, .claim     while that run may be alive: its owner, and its sources
    leases/<run>.driver, .ledger  heartbeats of its two processes (see `heartbeat`)
    runs/<run>/<number>.part, .whole    what that run has published (see `segments`)
    runs/<run>/fence-<by>-<number>      up to where that counts, once others call the run dead

Nothing here locks: there may be no lock that spans hosts. These rules keep rows safe instead:

* A run takes its lease in its turn (`mutex`), when no live run has a source in common with it.
* A run whose heartbeats have stopped for ``ttl_s`` is dead. Its successor puts up a *fence* before
  it relies on what the run has left, so what the dead run may still publish counts for no run. Only
  then the successor removes the lease.
* A run publishes a commit *before* it makes sure that no process could have declared it dead. So
  each successor has seen the commit. If the run cannot make sure, it commits nothing more.
* LMDB stays on the driver's own disk, in a scratch directory. The ledger's process publishes the
  records in it. A lock in the same directory proves to a successor on the same host that a run is
  dead, without waiting.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import override

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.claims import Claim, Owner, in_use_error, warn_waiting
from ray_resume.checkpoint.contents import Contents
from ray_resume.checkpoint.identity import SHARED_LAYOUT
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.local.lmdb_file import WriterContents
from ray_resume.checkpoint.local.reader import Reading
from ray_resume.checkpoint.objects import Objects
from ray_resume.checkpoint.shared import scratch
from ray_resume.checkpoint.shared.heartbeat import Heartbeat
from ray_resume.checkpoint.shared.leases import LeaseFile, LeaseRegistry, SharedLease, lease_names
from ray_resume.checkpoint.shared.mutex import BakeryMutex, TurnExpiredError, boottime_s
from ray_resume.checkpoint.shared.published import PublishedRuns, without_merged
from ray_resume.checkpoint.shared.segments import last_number
from ray_resume.checkpoint.shared.writer import SharedLedgerBinding
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint

__all__ = ["SharedBackend"]

T = TypeVar("T")

_MAX_SCANS = 10
_POLLS_PER_TTL = 15


class SharedBackend(CheckpointBackend):
    """A checkpoint in ``objects``.

    Args:
        ttl_s: how long a run's silence lasts until others declare it dead, in seconds.
        publish_interval_s: how long a completed source waits to be published.
        scratch_folder: a directory of this host's own; one in the host's directory for temporary
            files by default.
    """

    layout = SHARED_LAYOUT

    def __init__(
        self,
        objects: Objects,
        *,
        ttl_s: float,
        publish_interval_s: float,
        scratch_folder: Path | None = None,
        clock: Callable[[], float] = boottime_s,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(objects)
        self._ttl_s = ttl_s
        self._publish_interval_s = publish_interval_s
        self._scratch = scratch_folder
        self._clock = clock
        self._sleep = sleep
        self._leases = LeaseRegistry(objects, ttl_s=ttl_s, clock=clock)
        self._published = PublishedRuns(objects)

    @property
    @override
    def max_death_detection_s(self) -> float:
        return self._ttl_s * 1.25

    @override
    def identity(self) -> str:
        """Return the checkpoint's id."""
        try:
            return super().identity()
        except CheckpointError:
            # Where an object cannot be replaced in one step, half of it may have been there.
            self._sleep(0.2)
            return super().identity()

    @override
    def acquire(self, owner: Owner, claim: Claim, *, wait_s: float) -> SharedLease:
        deadline = self._clock() + wait_s
        run_id = owner.run_id
        folder = self._scratch_folder()
        lock = Lease.hold_unclaimed(folder, owner)
        file = LeaseFile(owner, self._ttl_s, scratch.boot_id(), str(lock.path), claim.shard)
        heart: Heartbeat | None = None
        awaited: Owner | None = None
        try:
            self._objects.put(f"leases/{run_id}.claim", claim.to_bytes())
            while True:
                # Look before queueing: a run that waits here usually waits for a rival.
                rival = self._leases.rival(claim, run_id)
                if rival is None:
                    rival, heart = self._take(file, claim)
                    if heart is not None:
                        break
                if rival is not None and self._clock() >= deadline:
                    raise in_use_error(self.uri, owner, rival, wait_s)
                if rival is not None and rival != awaited:
                    warn_waiting(self.uri, owner, rival, wait_s)
                    awaited = rival
                self._sleep(self._ttl_s / _POLLS_PER_TTL)
            scratch.remove_dead_runs(folder, self._leases.known)
            heart.start()
            return SharedLease(self._objects, run_id, heart, lock)
        except BaseException:
            with contextlib.suppress(CheckpointError):
                self._objects.delete(lease_names(run_id, "json", "claim", "driver"))
            with contextlib.suppress(CheckpointError):
                if heart is not None:
                    heart.end()
            lock.end(wait_s=0)
            raise

    def _take(self, file: LeaseFile, claim: Claim) -> tuple[Owner | None, Heartbeat | None]:
        """Take a lease in this process's turn: return a rival, or a heartbeat that has begun."""
        run_id = file.owner.run_id

        def take() -> tuple[Owner | None, Heartbeat | None]:
            rival = self._leases.rival(claim, run_id)
            if rival is not None:
                return rival, None
            # Observers must find a heartbeat beside the lease from the start.
            heart = self._heart(f"leases/{run_id}.driver")
            self._objects.put(f"leases/{run_id}.json", file.to_bytes())
            return None, heart

        return self._exclusively(
            run_id, take, undo=lambda: self._objects.delete(lease_names(run_id, "json"))
        )

    @override
    def rival(self, claim: Claim) -> Owner | None:
        return self._leases.rival(claim, "")

    @override
    def bind_ledger(self, run_id: str, lease: SharedLease) -> SharedLedgerBinding:
        return SharedLedgerBinding(
            self._objects, run_id, str(lease.lock.path), self._ttl_s, self._publish_interval_s
        )

    @override
    def scan(self) -> Contents:
        for attempt in range(_MAX_SCANS):
            listed = self.list_runs()
            readings = self._published.read(self._published.names())
            # A live run may have merged some of its segments into another in the meantime.
            if all(reading.error is None for reading in readings) or attempt == _MAX_SCANS - 1:
                break
            self._sleep(0.1)
        return Contents(listed.live, listed.killed, listed.files, without_merged(readings))

    @override
    def list_runs(self) -> Contents:
        """Note the live and the killed runs, and list the writers' files; read none of them.

        A run that has been silent for long, by the storage's clock and this host's, counts as
        killed. For reports this is exact enough; no run relies on it.

        """
        live, killed = self._leases.owners()
        # Another thread may scan at the same time.
        leases = self._leases.known
        listing = self._objects.list("leases")
        for run_id in list(live):
            times = [
                info.mtime_ns
                for name, info in listing.items()
                if name.startswith(f"leases/{run_id}.") and info.mtime_ns is not None
            ]
            lease = leases.get(run_id)
            if times and lease and time.time() - max(times) / 1e9 > lease.ttl_s:
                killed[run_id] = live.pop(run_id)
        return Contents(live, killed, self.writers())

    @override
    def read_runs(self, run_ids: Iterable[str], live: Collection[str]) -> Sequence[Reading]:
        wanted = set(run_ids)
        if not wanted:
            return ()
        names = self._published.names()
        return self._published.read({run: names[run] for run in names.keys() & wanted})

    @override
    def writers(self) -> dict[str, Path | str]:
        return {
            run_id: self._published.folder(run_id)
            for run_id, names in self._published.names().items()
            if last_number(names)
        }

    @override
    def write_whole(
        self, run_id: str, header: Mapping[str, Any], blocks: Iterable[bytes]
    ) -> Reading:
        return self._published.write_whole(run_id, header, blocks)

    @override
    def remove_writers(self, files: Mapping[str, Path | str]) -> None:
        runs = self._published.names()
        for run_id in files:
            failpoint("compact.removing")
            # Fences may go: of what is merged, the merged file alone counts.
            self._published.remove(run_id, runs.get(run_id, ()))

    @override
    def _exclusively(
        self, who: str, act: Callable[[], T], *, undo: Callable[[], None] = lambda: None
    ) -> T:
        while True:
            try:
                with self._mutex(who).acquire() as turn:
                    result = act()
                    try:
                        turn.confirm()
                    except TurnExpiredError:
                        undo()
                        raise
                    return result
            except TurnExpiredError:
                continue

    def _mutex(self, who: str) -> BakeryMutex:
        return BakeryMutex(
            self._objects,
            "queue",
            who,
            patience_s=self._ttl_s,
            clock=self._clock,
            sleep=self._sleep,
        )

    def _heart(self, name: str) -> Heartbeat:
        return Heartbeat(
            self._objects, name, ttl_s=self._ttl_s, clock=self._clock, also=self._leases.scan
        )

    @override
    def _new_id(self) -> str:
        # Processes that make it at once make the same. Checkpoints elsewhere have other ids.
        return hashlib.blake2b(self.root.encode(), digest_size=4).hexdigest()

    @override
    def _live_runs(self) -> dict[str, Owner]:
        return self._leases.owners()[0]

    @override
    def _read_dead_runs(self, own: str, own_contents: WriterContents | None) -> Contents:
        """Read what dead runs and run ``own`` committed.

        Dead runs that no process has declared dead before are fenced first, and lose their lease.
        So is run ``own``, if it has published.
        """
        self._fence_the_dead(own)
        self._published.fence_own(own)
        # A run with a lease may be at work, whichever it is. A run that has published and has no
        # lease is over, and was fenced before it lost its lease: its names are listed after that.
        known = self._published.names().keys()
        live, dead = self._leases.owners()
        live = {run_id: owner for run_id, owner in {**live, **dead}.items() if run_id != own}
        runs = {
            run_id: names
            for run_id, names in self._published.names().items()
            if run_id in known and run_id not in live
        }
        readings = without_merged(self._published.read(runs))
        return Contents(live, {}, {r.run_id: r.path for r in readings}, readings)

    def _fence_the_dead(self, own: str) -> None:
        _, dead = self._leases.owners()
        dead.pop(own, None)
        if not dead:
            return
        self._published.fence(dead, by=own)
        failpoint("shared.fenced")
        for run_id in dead:
            self._objects.delete(lease_names(run_id))

    def _scratch_folder(self) -> Path:
        if self._scratch is None:
            self._scratch = scratch.make_scratch(self.identity(), self.uri)
        return self._scratch
