"""The leases of runs in a storage that hosts share: held ones, and those of all runs.

`backend` describes how a lease is taken, and when it is lost.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.objects import ObjectInfo, Objects
from ray_resume.checkpoint.shared import scratch
from ray_resume.checkpoint.shared.heartbeat import Heartbeat, HeartbeatMonitor
from ray_resume.checkpoint.shared.published import RUN_ID, PublishedRuns
from ray_resume.core.shards import Shard
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint

__all__ = ["LeaseRegistry", "SharedLease", "lease_names"]

_KINDS = ("json", "claim", "driver", "ledger")


def lease_names(run_id: str, *kinds: str) -> list[str]:
    """Return the names of a lease's objects, all by default."""
    return [f"leases/{run_id}.{kind}" for kind in kinds or _KINDS]


class SharedLease:
    """A held lease: in the driver's process, or in the ledger's process that has joined it."""

    def __init__(self, objects: Objects, run_id: str, heart: Heartbeat, lock: Lease) -> None:
        self.lock = lock
        self._objects = objects
        self._published = PublishedRuns(objects)
        self._run_id = run_id
        self._heart = heart

    @classmethod
    def join(cls, objects: Objects, run_id: str, heart: Heartbeat, lock: Lease) -> SharedLease:
        """Hold a run's lease in this process, too. Its ``heart`` has beaten once.

        The driver must :meth:`check` the lease after that, and before anything is committed. From
        the first beat on, this process keeps the run alive. Until then the driver must have.

        Raises:
            CheckpointError: the lease is gone: its run has ended, or was declared dead.
        """
        lease = cls(objects, run_id, heart, lock)
        lease.check()
        heart.start()
        return lease

    def check(self) -> None:
        """Make sure that the lease is held, and that no process has declared this run dead.

        Raises:
            CheckpointError: the lease is lost, or may be.
        """
        self._heart.check()
        fenced = self._published.is_fenced(self._run_id)
        if fenced or self._objects.get(f"leases/{self._run_id}.json") is None:
            raise CheckpointError(
                f"The lease of run {self._run_id} is lost: another run saw no heartbeat of it and "
                "declared it dead. This run commits nothing more; run again to go on."
            )
        self._heart.check()

    def confirm(self) -> None:
        """Make sure that a process that declares this run dead sees what was published so far.

        Raises:
            CheckpointError: a process may have declared it dead before.
        """
        self._heart.check()

    def is_last_holder(self, *, wait_s: float) -> bool:
        """Say whether no other process of this run holds the lease, after ``wait_s`` at most."""
        return self.lock.is_last_holder(wait_s=wait_s)

    def end(self, *, wait_s: float) -> None:
        """Release the lease: the run is over, once no other process of it holds the lease."""
        with contextlib.suppress(CheckpointError):
            if self.is_last_holder(wait_s=wait_s) and self._heart.is_alive():
                # Without a lease, no successor fences this run. Its clean-up usually did already.
                self._published.fence_own(self._run_id)
                failpoint("shared.ending")
                self._objects.delete(lease_names(self._run_id, "json"))
                self._objects.delete(lease_names(self._run_id, "claim", "ledger"))
        with contextlib.suppress(CheckpointError):
            self._heart.end()
        self.lock.end(wait_s=0)

    def release(self) -> None:
        """Release the lease in this process."""
        with contextlib.suppress(CheckpointError):
            self._heart.end()
        self.lock.release()


class LeaseRegistry:
    """All leases in a storage, as this process has seen them.

    Args:
        ttl_s: how long a run's silence lasts until others declare it dead, where its lease does
            not say that.
    """

    def __init__(self, objects: Objects, *, ttl_s: float, clock: Callable[[], float]) -> None:
        self._objects = objects
        self._ttl_s = ttl_s
        self._clock = clock
        self._monitor = HeartbeatMonitor()
        # The heartbeat's thread scans as well, so that silent runs are known at a run's end.
        self._scanning = threading.Lock()
        self._leases: dict[str, LeaseFile] = {}
        self._claims: dict[str, Claim] = {}
        self._declared_dead: set[str] = set()

    @property
    def known(self) -> Mapping[str, LeaseFile]:
        """The leases that the last scan found, by run id."""
        return self._leases

    def scan(self) -> None:
        """List all leases and heartbeats, and read the leases that are new."""
        before = self._clock()
        listing = self._objects.list("leases")
        after = self._clock()
        signs: dict[str, dict[str, ObjectInfo]] = {}
        for name, info in listing.items():
            run_id, _, kind = name.removeprefix("leases/").partition(".")
            if f"leases/{run_id}.json" in listing and RUN_ID.fullmatch(run_id):
                signs.setdefault(run_id, {})
                if kind in ("driver", "ledger"):
                    signs[run_id][kind] = info
        known = self._leases
        leases = {run_id: known[run_id] for run_id in signs if run_id in known}
        new = [run_id for run_id in signs if run_id not in known]
        read = self._objects.get_all([f"leases/{run_id}.json" for run_id in new])
        for run_id, data in zip(new, read, strict=True):
            if data is not None:
                leases[run_id] = LeaseFile.parse(run_id, data, self._ttl_s)
        with self._scanning:
            self._monitor.observe(signs, before=before, after=after)
            self._leases = leases

    def owners(self) -> tuple[dict[str, Owner], dict[str, Owner]]:
        """Scan; return the owners of live runs, as far as this process can tell, and of dead."""
        self.scan()
        with self._scanning:
            leases = self._leases
            silent = {run for run, t in leases.items() if self._monitor.silent_s(run) >= t.ttl_s}
        self._declared_dead |= silent
        self._declared_dead |= {run for run, t in leases.items() if t.is_proven_dead()}
        live = {run: t.owner for run, t in leases.items() if run not in self._declared_dead}
        dead = {run: t.owner for run, t in leases.items() if run in self._declared_dead}
        return live, dead

    def rival(self, claim: Claim, own: str) -> Owner | None:
        """Scan; return the owner of a live run, not ``own``, whose claim overlaps ``claim``."""
        live, _ = self.owners()
        live.pop(own, None)
        with self._scanning:
            shards = {run: lease.shard for run, lease in self._leases.items()}
        # The digests of other shards need not be read.
        near = [run for run in live if Claim(None, shards.get(run)).overlaps(claim)]
        self._read_claims([run for run in near if run not in self._claims])
        for run_id in near:
            # A lease without a claim has ended since, or may claim everything.
            if self._claims.get(run_id, Claim(None)).overlaps(claim):
                return live[run_id]
        return None

    def _read_claims(self, run_ids: Sequence[str]) -> None:
        found = self._objects.get_all([f"leases/{run_id}.claim" for run_id in run_ids])
        for run_id, data in zip(run_ids, found, strict=True):
            # A damaged claim keeps others out for as long as its run lives.
            with contextlib.suppress(CheckpointError):
                if data is not None:
                    self._claims[run_id] = Claim.from_bytes(data)


@dataclass(frozen=True)
class LeaseFile:
    """A lease as it is stored: its owner, and what may prove the owner dead."""

    owner: Owner
    ttl_s: float
    boot: str | None
    lock: str | None
    shard: tuple[int, int] | None = None

    def to_bytes(self) -> bytes:
        """Serialize the lease as JSON."""
        values = {"ttl_s": self.ttl_s, "share": self.shard, "boot": self.boot, "lock": self.lock}
        return json.dumps({**asdict(self.owner), **values}).encode()

    @classmethod
    def parse(cls, run_id: str, data: bytes, default_ttl_s: float) -> LeaseFile:
        """Read what :meth:`to_bytes` wrote; a damaged lease has an unknown owner."""
        try:
            values = json.loads(data)
            ttl_s = float(values.pop("ttl_s"))
            boot, lock = values.pop("boot"), values.pop("lock")
            share = values.pop("share")
            shard = None if share is None else Shard(*share)
            owner = Owner.of(values)
            if not (isinstance(boot, str | None) and isinstance(lock, str) and 0 < ttl_s < 1e6):
                raise ValueError("its values have other types")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            # Its name alone is known. The lease counts for as long as its heartbeats last.
            return cls(Owner(run_id, "unknown", 0, time.time()), default_ttl_s, None, None)
        part = None if shard is None else (shard.index, shard.count)
        return cls(owner, ttl_s, boot, lock, part)

    def is_proven_dead(self) -> bool:
        """Say whether this host's kernel knows that no process of the run is left."""
        if self.lock is None or self.boot is None or self.boot != scratch.boot_id():
            return False
        # Containers of one host may not see each other's files: a missing file proves nothing.
        return Lease.is_orphaned(Path(self.lock))
