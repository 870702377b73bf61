"""Merges the writers' files of a checkpoint into one, so that many small runs stay quick to read.

Invariant: at every moment the files that are there have the same union. The merged file gets its
name whole and durable; only then the files that it stands for are removed, one by one. A record
counts by its sequence number and run id, whichever file it is in, so a crash in between leaves
files that say the same twice, and the next compaction goes on from there.

The merged file's header has the headers of all runs whose files it replaces: that they are known,
and what they listed, must outlive their files.
"""

from __future__ import annotations

from ray_resume.directory import MERGED, CheckpointDirectory, Contents, new_run_id
from ray_resume.errors import CheckpointError
from ray_resume.faults import reached
from ray_resume.lease import Claim, Lease, Owner, guard
from ray_resume.reader import read_writers
from ray_resume.store import remove_half_made, write_whole

__all__ = ["compact"]


def compact(directory: CheckpointDirectory, *, lease_wait_s: float) -> int:
    """Merge all writers' files of ``directory`` into one; return how many were merged.

    No run is alive meanwhile, and none can start.

    Raises:
        CheckpointError: a run is at work, a file cannot be read, or the disk is full. Nothing
            was changed.
    """
    directory.identity()
    path, run_id = directory.path, new_run_id()
    lease = Lease.acquire(path, Owner.here(run_id), Claim(None), wait_s=lease_wait_s)
    try:
        remove_half_made(path)
        contents = directory.settled(run_id)
        if len(contents.files) < 2:
            return 0
        # What cannot be read must not outlive the file that it came from.
        for _ in contents.union:
            pass
        pairs = dict(contents.union.pairs())
        merged = write_whole(path, run_id, _header(contents), pairs.items())
        (written,) = read_writers({run_id: (merged, False)})
        if dict(written.pairs) != pairs:
            merged.unlink(missing_ok=True)
            raise CheckpointError(
                f"The checkpoint file {merged} did not come back as it was written"
                f"{f' ({written.error})' if written.error else ''}; it was removed again, and the "
                "files that it was made from are as they were. Is the disk failing?"
            )
        lease.check()
        reached("compact.merged")
        # Whoever lists the files under the guard sees all of the old ones or none.
        with guard(path):
            for old in contents.files.values():
                reached("compact.removing")
                old.unlink(missing_ok=True)
        return len(contents.files)
    finally:
        lease.end(wait_s=0)


def _header(contents: Contents) -> dict[str, object]:
    # What earlier compactions were called is of no use to anybody.
    runs = {
        run_id: {name: value for name, value in header.items() if name != MERGED}
        for run_id, header in contents.headers.items()
        if MERGED not in header
    }
    return {"purpose": "compact", MERGED: runs}
