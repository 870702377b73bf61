"""Publishes a run's records to a storage that hosts share, from the ledger's process.

Invariant: once :meth:`SharedWriter.commit` has returned, each run that declares this one dead sees
the records.
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
from ray_resume.checkpoint.shared.segments import full_name, incremental_name
from ray_resume.core.records import Record, encode
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint

__all__ = ["SharedLedgerBinding", "SharedWriter"]

# So many incremental segments, or so large a share of all records in them, are published again as
# one full segment.
_FEW_SEGMENTS = 64
_MAX_SEGMENTS = 1000


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

    It is not thread-safe: one owner, one thread at a time. Each segment has a new number, so that
    no name is used twice. The constructor publishes the run's header, so that the run is known
    before it writes any row.

    Raises:
        CheckpointError: the storage fails, or the run may have been declared dead.

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
        self._bytes_incremental = self._bytes_full = 0
        self._uncertain = False
        self._publish(incremental_name, ())

    def commit(self, records: Iterable[Record]) -> None:
        """Publish ``records`` in one object. When this returns, every successor will see them.

        Raises:
            CheckpointError: a disk or the storage fails, or this run may have been declared dead.
                The records may count or not, and nothing more may be committed.
        """
        if self._uncertain:
            # Its number may be missing for ever. No run could read the segments after it then.
            raise CheckpointError(
                f"Run {self._run_id} does not know whether its last commit counts, so it commits "
                "nothing more. Its earlier commits are safe; run again to go on."
            )
        self._uncertain = True
        blocks = list(encode(records))
        self._local.append(blocks)
        failpoint("shared.before_publish")
        self._publish(incremental_name, blocks)
        self._bytes_incremental += sum(map(len, blocks))
        if self._is_fragmented():
            self._publish_full()
        self._uncertain = False

    def contents(self) -> None:
        """Return nothing: the driver reads what others would read."""

    def close(self) -> None:
        """Publish everything in one object in place of many, as far as that can be done."""
        try:
            # All is published. Many segments cost the next run time, and no rows.
            with contextlib.suppress(CheckpointError):
                self._publish_full()
        finally:
            self._local.close()
            with contextlib.suppress(OSError):
                self._local.path.unlink()

    def _is_fragmented(self) -> bool:
        count = len(self._published)
        grown = self._bytes_incremental * 4 >= self._bytes_full
        return count >= _MAX_SEGMENTS or (count >= _FEW_SEGMENTS and grown)

    def _publish_full(self) -> None:
        if len(self._published) < 2:
            return
        before, self._published = self._published, []
        self._publish(full_name, self._local.blocks())
        failpoint("shared.whole")
        # `_publish` has confirmed the lease: a run that puts up a fence later has seen the full
        # segment, and needs no other. The check makes sure that there is no fence yet, even if
        # this host's clock is wrong.
        self._lease.check()
        self._objects.delete(before)
        self._bytes_full += self._bytes_incremental
        self._bytes_incremental = 0

    def _publish(self, name_of: Callable[[int], str], blocks: Iterable[bytes]) -> None:
        self._lease.confirm()
        self._number += 1
        name = f"runs/{self._run_id}/{name_of(self._number)}"
        header = self._header if name_of is full_name or self._number == 1 else {}
        self._objects.put(name, encode_segment(header, blocks))
        failpoint("shared.published")
        # Only now is it known that no run had declared this one dead when the object was put there.

        self._lease.confirm()
        self._published.append(name)
