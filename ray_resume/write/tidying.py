"""Tidy the output: rewrite files with dead rows, merge small files, remove leftovers.

Rows of a file are dead if their source failed, got lost, was replaced, or was drained twice (see
`core.ledger`). After a tidy the folder is as users expect it. Each file holds rows of completed
sources alone, each once, and nothing else of this checkpoint is there.

A tidy takes a lease on the sources in the files that it rewrites, *then* reads what dead runs
committed, and rewrites what is still due (see `write.rewriter`). *Then* it reads the records again,
and only then removes files that no record lists.

Runs in the driver, or in the command without Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ray_resume.checkpoint.backend import CheckpointBackend, RunLease, new_run_id
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.contents import Contents
from ray_resume.core.digests import Digests
from ray_resume.core.rewrites import Copy, Rewrite, plan_rewrites, records_in, still_due
from ray_resume.core.shards import Shard
from ray_resume.core.snapshot import Snapshot
from ray_resume.errors import CheckpointError
from ray_resume.write.folder import Folder
from ray_resume.write.output import FolderOutput
from ray_resume.write.rewriter import Outcome, Rewriter
from ray_resume.write.row_copies import copy_rewrite

__all__ = ["copy_here", "tidy_output"]

logger = logging.getLogger("ray_resume")

# A tidy that meets another run asks for so many rewrites whether that run is in their way.
_MAX_QUESTIONS = 200


def copy_here(folder: Folder) -> Copy:
    """Return a function that writes new files in this process, as their old ones were written."""
    return lambda rewrites: [copy_rewrite(folder, rewrite, name) for rewrite, name in rewrites]


def tidy_output(
    storage: CheckpointBackend,
    folder: Folder,
    copy: Copy,
    *,
    seen: Snapshot | None = None,
    target_file_bytes: int | None = None,
    max_rows: int | None = None,
    own: Digests | None = None,
    shard: Shard | None = None,
    wait_s: float,
) -> Outcome:
    """Rewrite the files of the output that are not clean, and remove leftovers.

    Files with sources of a live run stay as they are: that run, or a later one, tidies them. If
    all files have such sources, that is an error.

    Args:
        seen: the records that a run read when it removed leftovers at its end. By default the
            tidy reads the records, and removes leftovers.
        target_file_bytes: merge files of at most half of this size into files of about this size.
        max_rows: the most rows of a merged file.
        own: the sources whose files may be merged; by default, all.
        shard: leave files alone that have sources outside of this share.
        wait_s: how long to wait for another run on the same sources to end.

    Raises:
        CheckpointError: another run is at work on sources of all these files, or the checkpoint
            cannot be read or written. Committed output is as it was.
        OSError: the output cannot be read or written; likewise.
    """
    storage.identity()
    snapshot = storage.snapshot().snapshot if seen is None else seen
    if target_file_bytes is None:
        plan = plan_rewrites(snapshot, share=shard)
    else:
        plan = plan_rewrites(
            snapshot,
            sizes=dict(folder.sizes()),
            target_bytes=target_file_bytes,
            max_rows=max_rows,
            own=own,
            share=shard,
        )
    tidying = _Tidying(storage, folder, shard)
    if plan:
        return tidying.execute(snapshot, plan, copy, wait_s)
    if seen is None:
        tidying.remove_leftovers_alone(wait_s)
    return Outcome()


class _Tidying:
    def __init__(
        self,
        storage: CheckpointBackend,
        folder: Folder,
        shard: Shard | None,
    ) -> None:
        self._storage, self._folder, self._shard = storage, folder, shard
        self._run_id = new_run_id()
        self._checkpoint_id = storage.identity()

    def execute(
        self, snapshot: Snapshot, plan: Sequence[Rewrite], copy: Copy, wait_s: float
    ) -> Outcome:
        """Rewrite what is still to be rewritten, under a lease on the sources of ``plan``."""
        plan, lease = self._claimed(snapshot, plan, wait_s)
        try:
            now = self._storage.committed_by_dead_runs(self._run_id).snapshot
            rewriter = Rewriter(self._storage, self._folder, self._run_id, lease, purpose="tidy")
            outcome = rewriter.execute(now, still_due(plan, now), copy)
            for fault in outcome.faults:
                logger.warning("Output files were not rewritten or merged: %s", fault)
            lease.check()
            self._remove_leftovers(self._storage.committed_by_dead_runs(self._run_id))
            return outcome
        finally:
            lease.end(wait_s=0)

    def _claimed(
        self, snapshot: Snapshot, plan: Sequence[Rewrite], wait_s: float
    ) -> tuple[Sequence[Rewrite], RunLease]:
        """Take a lease on the sources of ``plan``, or of those rewrites that no other run is in.

        Raises:
            CheckpointError: another run is at work on sources of each rewrite.
        """
        owner = Owner.here(self._run_id, None if self._shard is None else str(self._shard))
        claim = self._claim_of(snapshot, plan)
        try:
            return plan, self._storage.acquire(owner, claim, wait_s=wait_s)
        except CheckpointError:
            # Each question reads the claims of other runs, which may be large.
            free = [
                rewrite
                for rewrite in plan[:_MAX_QUESTIONS]
                if self._storage.rival(self._claim_of(snapshot, [rewrite])) is None
            ]
            if not free:
                raise
        return free, self._storage.acquire(owner, self._claim_of(snapshot, free), wait_s=0)

    def _claim_of(self, snapshot: Snapshot, plan: Sequence[Rewrite]) -> Claim:
        digests = snapshot.digests.take(records_in(snapshot, plan))
        share = None if self._shard is None else (self._shard.index, self._shard.count)
        return Claim(digests.to_bytes(), share)

    def remove_leftovers_alone(self, wait_s: float) -> None:
        """Remove what dead runs left, under a lease on no source."""
        lease = self._storage.acquire(Owner.here(self._run_id), Claim([]), wait_s=wait_s)
        try:
            self._remove_leftovers(self._storage.committed_by_dead_runs(self._run_id))
        finally:
            lease.end(wait_s=0)

    def _remove_leftovers(self, contents: Contents) -> None:
        runs = contents.dead_runs | {self._run_id}
        FolderOutput(self._folder, append=True).remove_leftovers(
            self._checkpoint_id, runs, contents
        )
