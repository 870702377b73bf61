"""Merge the writers' files of a checkpoint into one, so that many small runs stay quick to read.

Invariant: at every moment the same records count. The merged file gets its name whole and durable.
Only then the files that it replaces are removed, one by one. A record counts by its sequence number
and run id, whichever file it is in. So a crash in between leaves records in two files, and the next
compaction goes on from there.

The merged file's header has the headers of all runs whose files it replaces. The runs must stay
known when their files are gone.
"""

from __future__ import annotations

from itertools import zip_longest

from ray_resume.checkpoint.backend import CheckpointBackend, new_run_id
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.contents import MERGED, Contents
from ray_resume.checkpoint.runs import merge_history
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint

__all__ = ["compact"]


def compact(storage: CheckpointBackend, *, lease_wait_s: float) -> int:
    """Merge all writers' files of ``storage`` into one; return how many were merged.

    No run is alive meanwhile, and none can start.

    Raises:
        CheckpointError: a run is at work, a file cannot be read, or the disk is full. Nothing
            was changed.
    """
    storage.identity()
    run_id = new_run_id()
    lease = storage.acquire(Owner.here(run_id), Claim(None), wait_s=lease_wait_s)
    try:
        storage.remove_half_made()
        contents = storage.committed_by_dead_runs(run_id)
        # A killed compaction leaves files that a merged file replaces already.
        left = {
            run: path
            for run, path in storage.writers().items()
            if run in contents.headers and run not in contents.files
        }
        if left:
            storage.remove_writers(left)
        merge_history(storage, contents, run_id)
        if len(contents.files) < 2:
            return len(left)
        written = storage.write_whole(run_id, _header(contents), contents.snapshot.blocks())
        came_back = zip_longest(contents.snapshot.blocks(), written.records.blocks)
        if written.error or not all(ours == theirs for ours, theirs in came_back):
            storage.remove_writers({run_id: written.path})
            raise CheckpointError(
                f"The checkpoint file {written.path} did not come back as it was written"
                f"{f' ({written.error})' if written.error else ''}; it was removed again, and the "
                "files that it was made from are as they were. Is the disk failing?"
            )
        lease.check()
        failpoint("compact.merged")
        storage.remove_writers(contents.files)
        return len(contents.files)
    finally:
        lease.end(wait_s=0)


def _header(contents: Contents) -> dict[str, object]:
    # The run ids of earlier compactions are of no use.
    runs = {
        run_id: {name: value for name, value in header.items() if name != MERGED}
        for run_id, header in contents.headers.items()
        if MERGED not in header
    }
    return {"purpose": "compact", MERGED: runs}
