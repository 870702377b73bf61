"""What a run's ledger publishes to a storage that hosts share, and where it finds that.

Invariant: what :meth:`SharedWriter.commit` has returned from is seen by whoever calls the run dead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

from ray_resume.checkpoint.backend import LedgerBinding
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.checkpoint.objects import Objects
from ray_resume.checkpoint.shared.heartbeat import Heartbeat
from ray_resume.checkpoint.shared.leases import SharedLease
from ray_resume.checkpoint.shared.segments import encode as encode_segment
from ray_resume.checkpoint.shared.segments import part_name, whole_name
from ray_resume.core.records import Record, encode
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint

__all__ = ["SharedLedgerBinding", "SharedWriter"]

# So many parts, or so large a part of all records in them, are published anew as one.
_FEW_PARTS = 64
_MAX_PARTS = 1000


@dataclass(frozen=True)
class SharedLedgerBinding(LedgerBinding):
    """The storage, the run's id and its lock on this host, for the run's ledger's process."""

    objects: Objects
    run_id: str
    lock: str
    ttl_s: float
    commit_interval_s: float

    @property
    @override
    def _objects(self) -> Objects:
        return self.objects

    @override
    def open(self, header: Mapping[str, Any]) -> tuple[SharedLease, SharedWriter]:
        scratch = Path(self.lock).parent
        lock = Lease.join(Path(self.lock))
        try:
            heart = Heartbeat(self.objects, f"leases/{self.run_id}.ledger", ttl_s=self.ttl_s)
            lease = SharedLease.join(self.objects, self.run_id, heart, lock)
            try:
                local = WriterFile.create(scratch, self.run_id, header)
                try:
                    return lease, SharedWriter(self.objects, self.run_id, header, lease, local)
                except BaseException:
                    local.close()
                    raise
            except BaseException:
                lease.release()
                raise
        except BaseException:
            lock.release()
            raise


class SharedWriter:
    """Commits to LMDB on this host's disk, and publishes what was committed there.

    Not thread-safe; one owner, one thread at a time. What is published has a number, and no name
    is ever used twice. Making it makes the run known by its header, before it writes any row.

    Raises:
        CheckpointError: the storage fails, or the run may have been called dead.
    """

    def __init__(
        self,
        objects: Objects,
        run_id: str,
        header: Mapping[str, Any],
        lease: SharedLease,
        local: WriterFile,
    ) -> None:
        self._objects = objects
        self._run_id = run_id
        self._header = {**header, "run_id": run_id}
        self._lease = lease
        self._local = local
        self._number = 0
        self._published: list[str] = []
        self._in_parts = self._in_whole = 0
        self._uncertain = False
        self._publish(part_name, ())

    def commit(self, records: Iterable[Record]) -> None:
        """Publish ``records`` in one object. When this returns, every successor will see them.

        Raises:
            CheckpointError: a disk or the storage fails, or this run may have been called dead.
                Whether they count is not known, and nothing more may be committed.
        """
        if self._uncertain:
            # Its number may be missing for ever, and what comes after it could not be read.
            raise CheckpointError(
                f"Run {self._run_id} does not know whether its last commit counts, so it commits "
                "nothing more. What was committed before is safe; run again to go on."
            )
        self._uncertain = True
        blocks = list(encode(records))
        self._local.append(blocks)
        failpoint("shared.before_publish")
        self._publish(part_name, blocks)
        self._in_parts += sum(map(len, blocks))
        parts = len(self._published)
        if parts >= _MAX_PARTS or (parts >= _FEW_PARTS and self._in_parts * 4 >= self._in_whole):
            self._publish_whole()
        self._uncertain = False

    def close(self) -> None:
        """Publish everything in one object in place of many, as far as that can be done."""
        try:
            # All is published; that it is in many pieces costs time, no rows.
            with contextlib.suppress(CheckpointError):
                self._publish_whole()
        finally:
            self._local.close()
            with contextlib.suppress(OSError):
                self._local.path.unlink()

    def _publish_whole(self) -> None:
        if len(self._published) < 2:
            return
        before, self._published = self._published, []
        self._publish(whole_name, self._local.blocks())
        failpoint("shared.whole")
        # Confirmed, so whoever puts up a fence has seen the whole, and needs no part of it; and
        # nobody has put one up already, whatever this host's clock is worth.
        self._lease.check()
        self._objects.delete(before)
        self._in_parts, self._in_whole = 0, self._in_whole + self._in_parts

    def _publish(self, name_of: Callable[[int], str], blocks: Iterable[bytes]) -> None:
        self._lease.confirm()
        self._number += 1
        name = f"runs/{self._run_id}/{name_of(self._number)}"
        header = self._header if name_of is whole_name or self._number == 1 else {}
        self._objects.put(name, encode_segment(header, blocks))
        failpoint("shared.published")
        # Only now it is known that nobody had called this run dead when it was put there.
        self._lease.confirm()
        self._published.append(name)
