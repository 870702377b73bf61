"""A checkpoint where it is kept; the base class of both kinds.

::

    checkpoint.json               identity and format version
    sink.json                     the sink that the checkpoint is bound to
    arrays/<array>/<rank>-<task>  the rank that each task of an array has drawn (see `core.shards`)
    history/<run>.*               that run: its start, signs of life, and end (see `history`)
    schemas/<run>.json            the output's column types, where that run changed them
    listings/<digest>.digests     the sources that runs have listed (see `listings`)
    publications/<run>-<number>   what a run publishes to a table, until it is committed
    dead-letters/...              rows that a stage refused (see `dead_letters`)

Both kinds keep these as whole objects (`objects`), and this module reads and writes them. The kinds
differ in what proves a run alive, in the lock that keeps processes apart, and in the place of the
records: `local.backend` has the kernel's locks and LMDB files, `shared.backend` has heartbeats, a
mutex of objects, and segments.

Invariant: a run relies only on what dead runs committed, and on its own records.
"""

from __future__ import annotations

import json
import os
import secrets
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from typing_extensions import override

from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.contents import Contents
from ray_resume.checkpoint.identity import IDENTITY, identity_bytes, read_identity
from ray_resume.checkpoint.listings import ListingStore
from ray_resume.checkpoint.local.lmdb_file import WriterContents
from ray_resume.checkpoint.local.reader import Reading
from ray_resume.checkpoint.objects import Objects
from ray_resume.checkpoint.ranks import RankDraw
from ray_resume.checkpoint.stores import Stores
from ray_resume.core.digests import Digests
from ray_resume.core.records import Record
from ray_resume.core.shards import ArrayTask
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint

__all__ = [
    "CheckpointBackend",
    "LedgerBinding",
    "LedgerLease",
    "RunLease",
    "Writer",
    "new_run_id",
]

T = TypeVar("T")

_SINK = "sink.json"


def new_run_id() -> str:
    """Draw a random run id: 12 hexadecimal digits."""
    return secrets.token_hex(6)


class Writer(Protocol):
    """The place that a run commits to."""

    def commit(self, records: Iterable[Record]) -> None:
        """Commit records in one step. When this returns they count, whichever process dies.

        Raises:
            CheckpointError: the storage is full or fails, or the lease is lost. The records may
                count or not, and the caller must commit nothing more.
        """

    def contents(self) -> WriterContents | None:
        """Return the header and all committed records; None if the driver is to read them."""

    def close(self) -> None:
        """End writing. The committed records can be read afterwards."""


class LedgerLease(Protocol):
    """A run's lease in its ledger's process."""

    def check(self) -> None:
        """Make sure that the lease is still held.

        Raises:
            CheckpointError: it is lost, or the storage cannot be asked.
        """

    def release(self) -> None:
        """Release the lease in this process."""


class RunLease(LedgerLease, Protocol):
    """A run's lease in its driver's process."""

    def is_last_holder(self, *, wait_s: float) -> bool:
        """Return whether no other process of this run holds the lease, after ``wait_s`` at most."""

    def end(self, *, wait_s: float) -> None:
        """Release the lease: the run is over, once no other process of it holds the lease."""


class LedgerBinding(Stores):
    """The part of a checkpoint that a run's ledger needs in its process; picklable.

    Attributes:
        commit_interval_s: how long a completed source waits for its commit at most, if the storage
            keeps up.
    """

    commit_interval_s: float

    @abstractmethod
    def open(self, header: Mapping[str, Any]) -> tuple[LedgerLease, Writer]:
        """Join the run's lease, and begin to write. The ledger's process calls this once.

        Raises:
            CheckpointError: the lease is gone, or the storage fails.
        """


class CheckpointBackend(Stores):
    """A checkpoint where it is kept. Making the object touches nothing.

    Attributes:
        uri: the checkpoint, as a user would write it, without secrets.
        root: the checkpoint, as the filesystem of an output folder writes it.

    Raises:
        CheckpointError: every method, where the checkpoint is missing, damaged, of another format,
            or out of reach.
    """

    layout: ClassVar[str | None]
    """The word in the identity that tells the two kinds apart."""

    def __init__(self, objects: Objects) -> None:
        self._kept = objects
        self.uri = objects.uri
        self.root = objects.path

    @property
    @override
    def _objects(self) -> Objects:
        return self._kept

    @property
    @abstractmethod
    def max_death_detection_s(self) -> float:
        """For how long a killed run may still seem to be at work, in seconds."""

    # Identity, sink, ranks.

    def ensure(self) -> str:
        """Create the checkpoint if it is missing, and return its id: 8 hexadecimal digits."""
        if self._objects.get(IDENTITY) is None:
            self._exclusively(_new_visitor(), self._create)
        return self.identity()

    def _create(self) -> None:
        if self._objects.get(IDENTITY) is None:
            identity = identity_bytes(self._new_id(), self.layout)
            failpoint("checkpoint.writing")
            self._objects.replace(IDENTITY, identity)

    def identity(self) -> str:
        """Return the checkpoint's id."""
        data = self._objects.get(IDENTITY)
        if data is None:
            raise CheckpointError(
                f"There is no checkpoint at {self.uri}. Is the path right? The first "
                "resumable_read that names a checkpoint makes it."
            )
        try:
            return read_identity(data, self.layout, self.uri)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._unreadable(IDENTITY, error) from error

    def sink(self) -> str | None:
        """Return the URI, path or name of the sink that the checkpoint is bound to, if any."""
        self.identity()
        return self._bound_sink()

    def _bound_sink(self) -> str | None:
        data = self._objects.get(_SINK)
        if data is None:
            return None
        try:
            sink = json.loads(data)["sink"]
            if not isinstance(sink, str):
                raise TypeError(f"its sink is {sink!r}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._unreadable(_SINK, error) from error
        return sink

    def bind(self, sink: str, own: str) -> None:
        """Bind the checkpoint to ``sink``, in place of any other. Call this under a lease.

        Raises:
            CheckpointError: it is bound to another sink, and a run other than ``own`` is alive.
        """
        if self.sink() == sink:
            return

        def bind() -> None:
            bound = self._bound_sink()
            if bound not in (None, sink) and self._live_runs().keys() - {own}:
                raise CheckpointError(
                    f"The checkpoint {self.uri} is being used for {bound} by another run, and this "
                    f"run would write to {sink}. Give this run a checkpoint of its own."
                )
            failpoint("checkpoint.writing")
            self._objects.replace(_SINK, json.dumps({"sink": sink}).encode())

        self._exclusively(own, bind)

    def rank_of(self, task: ArrayTask) -> int:
        """Return the rank of ``task`` among those of its array; the first call draws it.

        Guarantees: tasks with different indexes get different ranks, from 0 to ``count - 1``. A
        task with the same index gets the same rank again. The rank is durable.

        Raises:
            CheckpointError: more tasks than ``task.count`` ask.
        """
        rank = RankDraw(self._objects, task)
        return self._exclusively(_new_visitor(), rank.draw, undo=rank.undo)

    # Runs.

    @abstractmethod
    def acquire(self, owner: Owner, claim: Claim, *, wait_s: float) -> RunLease:
        """Take the lease of run ``owner.run_id`` once no live run shares a source with it.

        Raises:
            CheckpointError: after ``wait_s`` seconds a run still does; the message names its owner.
        """

    @abstractmethod
    def rival(self, claim: Claim) -> Owner | None:
        """Return the owner of a live run that shares a source with ``claim``, if there is one.

        The answer may be old as soon as it is there; only :meth:`acquire` is sure.
        """

    @abstractmethod
    def bind_ledger(self, run_id: str, lease: Any) -> LedgerBinding:
        """Return what the ledger's process needs of a run that holds ``lease``."""

    # Contents.

    def committed_by_dead_runs(
        self, own: str, own_contents: WriterContents | None = None
    ) -> Contents:
        """Read what dead runs and run ``own`` committed, to rely on it. Call this under a lease.

        The ledger of run ``own`` is closed, or not open yet. The live runs are noted first. A run
        that is alive then counts as alive, whatever it does meanwhile.

        Args:
            own_contents: what the ledger of run ``own`` had committed when it closed. Its file need
                not be read then.

        Raises:
            CheckpointError: a file cannot be read.
        """
        return self._read_dead_runs(own, own_contents).require_readable()

    def snapshot(self) -> Contents:
        """Read what dead and live runs committed up to now, for reports only.

        Raises:
            CheckpointError: a file cannot be read.
        """
        self.identity()
        return self.scan().require_readable()

    @abstractmethod
    def scan(self) -> Contents:
        """Read every writer's file, damaged or not, and note the live and the killed runs."""

    @abstractmethod
    def list_runs(self) -> Contents:
        """Note the live and the killed runs, and list the writers' files; read none of them."""

    @abstractmethod
    def read_runs(self, run_ids: Iterable[str], live: Collection[str]) -> Sequence[Reading]:
        """Read the files of some runs, for reports only; ``live`` are the runs at work."""

    @abstractmethod
    def writers(self) -> Mapping[str, Path | str]:
        """List the writers' files by run id."""

    @abstractmethod
    def write_whole(
        self, run_id: str, header: Mapping[str, Any], blocks: Iterable[bytes]
    ) -> Reading:
        """Make a durable writer's file of blocks of records, and read it back.

        A reader need not sort blocks that are in the order of their digests.
        """

    @abstractmethod
    def remove_writers(self, files: Mapping[str, Path | str]) -> None:
        """Remove writers' files that a merged file replaces."""

    def remove_half_made(self) -> None:
        """Remove what killed processes left half made. Call this under a lease on everything."""

    def listed(self) -> Digests | None:
        """Return the digests of the sources that the newest run has listed, None if none has.

        Those that runs have listed beside it are among them.
        """
        return ListingStore(self._objects).read()

    def record_listed(self, listed: Digests, own: str) -> None:
        """Record what run ``own`` has listed, in place of what no live run has. It has a lease."""
        listings = ListingStore(self._objects)
        if listings.is_only(listed):
            return
        listings.add(listed)

        def settle() -> None:
            # Another run may have removed it before it saw that this one is alive.
            listings.add(listed)
            if not self._live_runs().keys() - {own}:
                listings.remove_others(listed)

        self._exclusively(own, settle)

    # The differences between the kinds.

    @abstractmethod
    def _exclusively(
        self, who: str, act: Callable[[], T], *, undo: Callable[[], None] = lambda: None
    ) -> T:
        """Run ``act`` while no other process is inside such a call.

        Args:
            who: hexadecimal digits that no other process uses.
            undo: reverts ``act`` if it took too long to exclude the others; it runs again then.
        """

    @abstractmethod
    def _new_id(self) -> str:
        """Return the id of a new checkpoint."""

    @abstractmethod
    def _live_runs(self) -> Mapping[str, Owner]:
        """Return the live runs. Called inside :meth:`_exclusively`."""

    @abstractmethod
    def _read_dead_runs(self, own: str, own_contents: WriterContents | None) -> Contents:
        """Read what dead runs and run ``own`` committed."""

    def _unreadable(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"The checkpoint file {self.uri}/{name} cannot be read: {error!r}. Restore it from a "
            "copy, or start over with an empty checkpoint and an empty output folder."
        )


def _new_visitor() -> str:
    return os.urandom(6).hex()
