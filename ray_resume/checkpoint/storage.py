"""Where a checkpoint is: a directory of this host's own, or any storage that hosts share.

Both kinds are a :class:`CheckpointBackend`. They differ in the proof that a run is alive (locks of
the kernel, or heartbeats), and in the place where a commit counts (LMDB's file, or what was
published from it). A :class:`Location` is how a user writes a checkpoint down.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.contents import Contents, Look, Note
from ray_resume.checkpoint.dead_letters import DeadLetterStore
from ray_resume.checkpoint.local.backend import LocalBackend, local_path
from ray_resume.checkpoint.local.reader import Reading
from ray_resume.checkpoint.mounts import network_filesystem_type
from ray_resume.checkpoint.output_schemas import SchemaStore
from ray_resume.checkpoint.shared.backend import IDENTITY, LAYOUT, SharedBackend
from ray_resume.checkpoint.shared.objects import StoredObjects
from ray_resume.core.records import Record
from ray_resume.core.shards import ArrayTask
from ray_resume.files import public_uri

__all__ = ["CheckpointBackend", "LedgerBinding", "LedgerLease", "Location", "RunLease", "Writer"]

_OBJECT_TTL_S = 30.0
# Clients of network file systems may look at what they remember for up to a minute.
_MOUNT_TTL_S = 120.0
_PUBLISH_INTERVAL_S = 5.0
_SHORTEST_TTL_S = 2.0
# Longer than this, no thread can wait at once; and who is dead would be taken for alive for days.
_LONGEST_S = 86_400.0


class Writer(Protocol):
    """What a run commits to."""

    def commit(self, records: Sequence[Record]) -> None:
        """Commit records in one step: when this returns they count, whoever dies.

        Raises:
            CheckpointError: the storage is full or fails, or the lease is lost. It is not known
                whether they count, and nothing more may be committed.
        """

    def commit_encoded(self, stored: Sequence[bytes]) -> None:
        """Do as :meth:`commit`, with digests that are followed by encoded records."""

    def close(self) -> None:
        """End writing; what was committed can be read afterwards."""


class LedgerLease(Protocol):
    """A run's lease as its ledger's process holds it."""

    def check(self) -> None:
        """Make sure that the lease is still held.

        Raises:
            CheckpointError: it is not, or nobody can say.
        """

    def release(self) -> None:
        """Let go in this process."""


class RunLease(LedgerLease, Protocol):
    """A run's lease as its driver holds it."""

    def alone(self, *, wait_s: float) -> bool:
        """Say whether no other process of this run holds the lease, after ``wait_s`` at most."""

    def end(self, *, wait_s: float) -> None:
        """Release the lease: the run is over, once no other process of it holds it."""


class LedgerBinding(Protocol):
    """What the ledger's process needs of a checkpoint; picklable."""

    @property
    def commit_interval_s(self) -> float:
        """The longest that what is complete waits to be committed, the storage permitting."""

    def open(self, header: Mapping[str, Any]) -> tuple[LedgerLease, Writer]:
        """Join the run's lease, and begin to write; called once.

        Raises:
            CheckpointError: the lease is gone, or the storage fails.
        """

    def letters(self) -> DeadLetterStore:
        """Return where dead letters go."""

    def schemas(self) -> SchemaStore:
        """Return where the output's schema is kept."""


class CheckpointBackend(Protocol):
    """A checkpoint where it is kept. Making the object touches nothing.

    Raises:
        CheckpointError: every method, where the checkpoint is missing, damaged, of a newer format,
            or cannot be reached.
    """

    @property
    def uri(self) -> str:
        """Where it is, as a user would write it; no secrets are in it."""

    @property
    def root(self) -> str:
        """Where it is, as the file system of an output folder would spell it."""

    @property
    def max_death_detection_s(self) -> float:
        """For how long a run that was killed may seem to be at work, in seconds."""

    def ensure(self) -> str:
        """Create the checkpoint if it is missing, and return its id: 8 hexadecimal digits."""

    def identity(self) -> str:
        """Return the checkpoint's id."""

    def sink(self) -> str | None:
        """Return what names the sink that the checkpoint is bound to, if it is."""

    def bind(self, sink: str, own: str) -> None:
        """Bind the checkpoint to ``sink``; refused while another run works for another sink."""

    def rank_of(self, task: ArrayTask) -> int:
        """Return the rank of ``task`` among those of its array, drawn when it first asks."""

    def acquire(self, owner: Owner, claim: Claim, *, wait_s: float) -> RunLease:
        """Take a run's lease as soon as no live run shares a source with it."""

    def bind_ledger(self, run_id: str, lease: Any) -> LedgerBinding:
        """Return what the ledger's process of a run needs, which holds ``lease``."""

    def committed_by_dead_runs(self, own: str) -> Contents:
        """Read what all dead runs committed, and run ``own``, to rely on it; under a lease."""

    def snapshot(self) -> Contents:
        """Read what dead and live runs committed up to now: good to look at."""

    def scan(self) -> Look:
        """Read every writer's file, damaged or not, and say who is about."""

    def list_runs(self) -> Note:
        """Note who is about and which files there are."""

    def writers(self) -> Mapping[str, Path | str]:
        """List the writers' files by run id."""

    def letters(self) -> DeadLetterStore:
        """Return where dead letters are."""

    def schemas(self) -> SchemaStore:
        """Return where the output's schema is kept."""

    def write_whole(
        self, run_id: str, header: Mapping[str, Any], blocks: Iterable[bytes]
    ) -> Reading:
        """Make a writer's file of blocks of records, durable when this returns; read it back.

        In the order of their digests nobody need sort them again.
        """

    def remove_writers(self, files: Mapping[str, Path | str]) -> None:
        """Remove writers' files that others stand for."""

    def remove_half_made(self) -> None:
        """Remove what killed processes left half made; under a lease on everything."""


@dataclass(frozen=True)
class Location:
    """Where a checkpoint is, as its user says it; picklable. Touches nothing before :meth:`open`.

    Args:
        path: a path, or a URI.
        filesystem: the pyarrow (or fsspec) filesystem that ``path`` is on.
        publish_interval_s: where hosts share it: how long what is complete waits to be published.
        lease_ttl_s: likewise: how long a run's silence lasts until others call it dead.
        shared: whether other hosts use a directory that looks like one of this host's own.
    """

    path: str
    filesystem: Any = None
    publish_interval_s: float = _PUBLISH_INTERVAL_S
    lease_ttl_s: float | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.publish_interval_s <= _LONGEST_S:
            raise ValueError(
                f"publish_interval_s must be 0 to {_LONGEST_S:g} seconds, not "
                f"{self.publish_interval_s}"
            )
        ttl_s = self.lease_ttl_s
        if ttl_s is not None and not _SHORTEST_TTL_S <= ttl_s <= _LONGEST_S:
            raise ValueError(
                f"lease_ttl_s must be {_SHORTEST_TTL_S:g} to {_LONGEST_S:g} seconds, not {ttl_s}"
            )

    @property
    def local_path(self) -> Path | None:
        """The directory that is meant, if it is one on this host's file systems."""
        # Those of fsspec have no such name.
        if self.filesystem is not None and getattr(self.filesystem, "type_name", "") != "local":
            return None
        return local_path(self.path)

    def open(self) -> CheckpointBackend:
        """Return the storage.

        Raises:
            CheckpointError: there is no such kind of storage, or pyarrow cannot reach it.
        """
        path = self.local_path
        if path is None:
            return self._of(self._objects(), _OBJECT_TTL_S)
        mounted = network_filesystem_type(path) is not None
        if not (self.shared or mounted or _is_shared(path)):
            return LocalBackend(path)
        from pyarrow.fs import LocalFileSystem

        ttl_s = _MOUNT_TTL_S if mounted else _OBJECT_TTL_S
        return self._of(StoredObjects(LocalFileSystem(), str(path), str(path)), ttl_s)

    def _of(self, objects: StoredObjects, ttl_s: float) -> SharedBackend:
        return SharedBackend(
            objects,
            ttl_s=self.lease_ttl_s or ttl_s,
            publish_interval_s=self.publish_interval_s,
        )

    def _objects(self) -> StoredObjects:
        # pyarrow is not loaded for a directory of this host's own.
        from ray_resume.filesystems import open_uri

        filesystem, path = open_uri("checkpoint", self.path, self.filesystem)
        return StoredObjects(filesystem, path, public_uri(self.path))


def _is_shared(path: Path) -> bool:
    """Say whether the checkpoint in a directory was made as one that hosts share."""
    try:
        return bool(json.loads((path / IDENTITY).read_bytes())["layout"] == LAYOUT)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
