"""After a run: replace files that were written before the output's schema became what it is.

Invariant: killed at any moment, either the old files count or the new ones. New files are named
after the run that wrote the old ones, so a later run removes them if no record lists them. Their
records are committed in one step, under a lease on everything; only then the old files go.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ray_resume.checkpoint.backend import CheckpointBackend, new_run_id
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.contents import SUPERSEDES
from ray_resume.core.output_schema import OutputSchema, SchemaMismatchError
from ray_resume.core.records import Record, State, encode
from ray_resume.errors import CheckpointError, ResumeError
from ray_resume.failpoints import failpoint
from ray_resume.write.folder import Folder
from ray_resume.write.layout import Layout
from ray_resume.write.rewriting import rewrite_in_tasks, schemas_in_tasks

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
        names = storage.schemas().names()
        agreed = storage.schemas().read()
        assert agreed is not None
        contents = storage.committed_by_dead_runs(run_id)
        records = [record for record in contents.snapshot if record.files]
        agreed = _needed(folder, layout, agreed, records)
        files = sorted({file for record in records for file in record.files})
        done = rewrite_in_tasks(folder, layout, files, layout.whole_schema(agreed))
        failpoint("retyping.written")
        if done.kept:
            name, reason = next(iter(done.kept.items()))
            logger.warning(
                "%d output files keep types of their own, %s/%s for one: %s. Process their sources "
                "again, or have the UDFs return one type.",
                len(done.kept),
                folder.uri,
                name,
                reason,
            )
        if done.renamed:
            lease.check()
            sequence = contents.snapshot.highest_sequence()
            superseding = _superseding(records, done.renamed, sequence)
            # A record keeps the run that completed its source: that run's header says how the ids
            # of its sources are made.
            header = {"purpose": "schema", SUPERSEDES: sorted({r.run_id for r in superseding})}
            storage.write_whole(run_id, header, encode(superseding))
            failpoint("retyping.committed")
        lease.check()
        for name in done.renamed:
            folder.remove(name)
        # Another run tries again where files could not be given the schema.
        settled = replace(agreed, stale=bool(done.kept))
        storage.schemas().settle(run_id, settled, names)
    except OSError as error:
        raise ResumeError(f"The output {folder.uri} was not given one schema: {error}") from error
    finally:
        lease.end(wait_s=0)


def _needed(
    folder: Folder, layout: Layout, agreed: OutputSchema, records: Sequence[Record]
) -> OutputSchema:
    """Return the schema that was agreed on, widened by earlier output that is to be replaced.

    A run does not count the types of sources that it processes again. If one of them has failed,
    its earlier output is still there.
    """
    if agreed.given:
        return agreed
    waiting = [record for record in records if record.state is not State.COMPLETED]
    owner = {file: record.source_id for record in waiting for file in record.files}
    for file, schema in schemas_in_tasks(folder, layout, sorted(owner)).items():
        # If nothing holds both, its file is kept as it is.
        with contextlib.suppress(SchemaMismatchError):
            agreed = agreed.widened(schema, owner[file])
    return agreed


def _superseding(
    records: Sequence[Record], renamed: Mapping[str, str], sequence: int
) -> list[Record]:
    """Return a record for each source whose files have other names now."""
    found = []
    for record in records:
        if any(file in renamed for file in record.files):
            sequence += 1
            parts = tuple(
                part._replace(file=renamed.get(part.file, part.file)) for part in record.parts
            )
            found.append(replace(record, sequence=sequence, parts=parts))
    return found
