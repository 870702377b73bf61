"""Tidy the output: rewrite files with dead rows, merge small files, remove leftovers.

Rows of a file are dead if their source failed, got lost, was replaced, or was drained twice (see
`core.ledger`). After a tidy the folder is as users expect it. Each file holds rows of completed
sources alone, each once, and nothing else of this checkpoint is there.

A tidy is a small run: it has a run id and a lease on the sources in the files that it rewrites. So
no other run commits these sources meanwhile, and none removes the new files. The order keeps rows
safe: take the lease, *then* read what dead runs committed, register as a writer, and write the new
files durably. Commit the records that supersede the old ones in one transaction, and close. *Then*
read the records again, and only then remove files that no record lists.

Runs in the driver, or in the command without Ray.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ray_resume.checkpoint.backend import CheckpointBackend, RunLease, new_run_id
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.contents import SUPERSEDES, Contents
from ray_resume.core.digests import Digests
from ray_resume.core.filenames import stem_of
from ray_resume.core.rewrites import (
    Rewrite,
    moves_of,
    plan_rewrites,
    records_in,
    still_due,
    superseding,
)
from ray_resume.core.shards import Shard
from ray_resume.core.snapshot import Snapshot
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint
from ray_resume.write.folder import Folder
from ray_resume.write.output import FolderOutput
from ray_resume.write.row_copies import copy_rewrite

__all__ = ["Copy", "Tidied", "copy_here", "tidy_output"]

logger = logging.getLogger("ray_resume")

# A tidy that meets another run asks for so many rewrites whether that run is in their way.
_MAX_QUESTIONS = 200

Copy = Callable[[Sequence[tuple[Rewrite, str]]], Iterable[str | None]]
"""Writes the new file of each rewrite, under its name; returns what is wrong with each, or None."""


def copy_here(folder: Folder) -> Copy:
    """Return a function that writes new files in this process, as their old ones were written."""
    return lambda rewrites: [copy_rewrite(folder, rewrite, name) for rewrite, name in rewrites]


@dataclass(frozen=True)
class Tidied:
    """The result of a tidy: so many files were rewritten, and became so many."""

    rewritten: int = 0
    files: int = 0


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
) -> Tidied:
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
    return Tidied()


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
    ) -> Tidied:
        """Rewrite what is still to be rewritten, under a lease on the sources of ``plan``."""
        plan, lease = self._claimed(snapshot, plan, wait_s)
        try:
            contents = self._storage.committed_by_dead_runs(self._run_id)
            plan = still_due(plan, contents.snapshot)
            runs = contents.snapshot.runs(records_in(contents.snapshot, plan))
            header = {"purpose": "tidy", SUPERSEDES: sorted(runs)}
            ledger_lease, writer = self._storage.bind_ledger(self._run_id, lease).open(header)
            try:
                failpoint("tidy.registered")
                done = self._copied(plan, copy)
                self._folder.sync(name for _, name in done)
                failpoint("tidy.written")
                moves = {old: new for one, name in done for old, new in moves_of(one, name).items()}
                old_files = [file for rewrite, _ in done for file in rewrite.files]
                records = superseding(
                    contents.snapshot,
                    old_files,
                    moves,
                    sequence=contents.snapshot.highest_sequence(),
                )
                if done:
                    ledger_lease.check()
                    writer.commit(records)
                failpoint("tidy.committed")
            finally:
                writer.close()
                ledger_lease.release()
            lease.check()
            self._remove_leftovers(self._storage.committed_by_dead_runs(self._run_id))
            return Tidied(len(old_files), len(done))
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

    def _copied(self, plan: Sequence[Rewrite], copy: Copy) -> list[tuple[Rewrite, str]]:
        """Write the new files; return the rewrites that succeeded, with the new file's name.

        Files that cannot become one are tried in halves: one bad file keeps no other from it.
        """
        done = []
        while plan:
            named = [(rewrite, self._name_for(rewrite)) for rewrite in plan]
            plan = []
            for (rewrite, name), fault in zip(named, copy(named), strict=True):
                if fault is None:
                    done.append((rewrite, name))
                    continue
                if len(rewrite.files) <= 2:
                    logger.warning("Output files were not rewritten or merged: %s", fault)
                plan += [half for half in rewrite.halves() if len(half.files) > 1 or half.is_needed]
        return done

    def _name_for(self, rewrite: Rewrite) -> str:
        subfolder, slash, bare = rewrite.files[0].rpartition("/")
        prefix = f"{self._checkpoint_id}-{self._run_id}"
        stem = stem_of(prefix, None, subfolder + slash)
        return f"{subfolder}{slash}{stem}.{bare.partition('.')[2]}"

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
