"""After a run: replace files that were written before the output's schema became what it is.

Invariant: killed at any moment, either the old files count or the new ones. New files are named
after the run that wrote the old ones, so a later run removes them if no record lists them. Their
records are committed in one step, under a lease on everything; only then the old files go.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ray_resume.checkpoint.backend import CheckpointBackend, new_run_id
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.core.records import Record, encode
from ray_resume.errors import CheckpointError, ResumeError
from ray_resume.failpoints import failpoint
from ray_resume.write.folder import Folder
from ray_resume.write.layout import Layout
from ray_resume.write.rewriting import rewrite_in_tasks

__all__ = ["retype_output"]

# The ledger's process of the run that has just ended may take a moment to go.
_WAIT_S = 5.0

logger = logging.getLogger("ray_resume")


def retype_output(storage: CheckpointBackend, folder: Folder, layout: Layout) -> None:
    """Give all files of the output the schema that was agreed on, unless they have it.

    While another run is at work nothing is done: it, or the next run, does this at its end.

    Raises:
        ResumeError: the checkpoint or the output cannot be read or written. Committed output is as
            it was; the next run tries again.
    """
    agreed = storage.schemas().read()
    if agreed is None or not agreed.stale:
        return
    run_id = new_run_id()
    try:
        lease = storage.acquire(Owner.here(run_id), Claim(None), wait_s=_WAIT_S)
    except CheckpointError as error:
        logger.warning("Files with types of their own stay for now: %s", error)
        return
    try:
        agreed = storage.schemas().read()
        assert agreed is not None
        contents = storage.committed_by_dead_runs(run_id)
        records = [record for record in contents.snapshot if record.files]
        files = sorted({file for record in records for file in record.files})
        # The user's own has metadata as well, which is not agreed on.
        given = layout.schema if agreed.given else None
        schema = layout.agreed_columns(agreed.schema if given is None else given)
        done = rewrite_in_tasks(folder, layout, files, schema)
        failpoint("retyping.written")
        if done.kept:
            name, reason = next(iter(done.kept.items()))
            logger.warning(
                "%d output files keep types of their own, %s/%s for one: %s",
                len(done.kept),
                folder.uri,
                name,
                reason,
            )
        if done.renamed:
            lease.check()
            sequence = contents.snapshot.highest_sequence()
            superseding = _superseding(records, done.renamed, run_id, sequence)
            storage.write_whole(run_id, {"purpose": "schema"}, encode(superseding))
            failpoint("retyping.committed")
        lease.check()
        for name in done.renamed:
            folder.remove(name)
        storage.schemas().settle(run_id, replace(agreed, stale=False))
    except OSError as error:
        raise ResumeError(f"The output {folder.uri} was not given one schema: {error}") from error
    finally:
        lease.end(wait_s=0)


def _superseding(
    records: Sequence[Record], renamed: Mapping[str, str], run_id: str, sequence: int
) -> list[Record]:
    """Return a record for each source whose files have other names now."""
    found = []
    for record in records:
        if any(file in renamed for file in record.files):
            sequence += 1
            parts = tuple(
                part._replace(file=renamed.get(part.file, part.file)) for part in record.parts
            )
            found.append(replace(record, run_id=run_id, sequence=sequence, parts=parts))
    return found
