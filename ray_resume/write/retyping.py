"""After a run: rewrite files that were written before the output's schema became what it is.

Each file is rewritten alone (see `write.rewriter`), under a lease on everything.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ray_resume.checkpoint.backend import CheckpointBackend, new_run_id
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.core.output_schema import OutputSchema, SchemaMismatchError
from ray_resume.core.records import Record, State
from ray_resume.core.rewrites import rewrites_of
from ray_resume.errors import CheckpointError, ResumeError
from ray_resume.write.folder import Folder
from ray_resume.write.layout import Layout
from ray_resume.write.rewrite_tasks import retype_in_tasks, schemas_in_tasks, stale_in_tasks
from ray_resume.write.rewriter import Rewriter

__all__ = ["retype_output"]

# The ledger's process of the run that has just ended may take a moment to go.
_WAIT_S = 5.0

logger = logging.getLogger("ray_resume")


def retype_output(storage: CheckpointBackend, folder: Folder, layout: Layout) -> Mapping[str, str]:
    """Give all files of the output the schema that was agreed on, unless they have it.

    While another run is at work nothing is done: it, or the next run, does this at its end.

    Returns:
        The new file of each old one.

    Raises:
        ResumeError: the checkpoint or the output cannot be read or written. Committed output is as
            it was; the next run tries again.
    """
    agreed = storage.schemas().read()
    if agreed is None or not agreed.stale:
        return {}
    run_id = new_run_id()
    try:
        lease = storage.acquire(Owner.here(run_id), Claim(None), wait_s=_WAIT_S)
    except CheckpointError as error:
        logger.warning("Files with types of their own stay for now: %s", error)
        return {}
    try:
        names = storage.schemas().names()
        agreed = storage.schemas().read()
        assert agreed is not None
        snapshot = storage.committed_by_dead_runs(run_id).snapshot
        records = [record for record in snapshot if record.files]
        agreed = _needed(folder, layout, agreed, records)
        schema = layout.whole_schema(agreed)
        files = sorted({file for record in records for file in record.files})
        stale = stale_in_tasks(folder, layout, files, schema)
        outcome = Rewriter(storage, folder, run_id, lease, purpose="schema").execute(
            snapshot,
            rewrites_of(snapshot, [[file] for file in stale]),
            retype_in_tasks(folder, layout, schema),
        )
        if outcome.faults:
            logger.warning(
                "%d output files keep types of their own: %s. Process their sources again, or have "
                "the UDFs return one type.",
                len(outcome.faults),
                outcome.faults[0],
            )
        # Another run tries again where files could not be given the schema.
        settled = replace(agreed, stale=bool(outcome.faults))
        storage.schemas().settle(run_id, settled, names)
        return outcome.moved
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
