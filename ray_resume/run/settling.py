"""Settle the publications that dead runs left on record, before a run plans.

The driver does so at its start, under its lease. `core.publications` has the rules.
"""

from __future__ import annotations

import logging

from ray_resume.checkpoint.backend import CheckpointBackend, RunLease, new_run_id
from ray_resume.checkpoint.contents import SUPERSEDES, Contents
from ray_resume.core.publications import Mark, Publication, unsettled
from ray_resume.core.snapshot import Snapshot
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint
from ray_resume.run.table import Table

__all__ = ["settled_contents"]

logger = logging.getLogger("ray_resume")


def settled_contents(
    storage: CheckpointBackend, run_id: str, lease: RunLease, sink: str, table: Table | None
) -> Contents:
    """Settle what dead runs have left on record; return what the checkpoint has then.

    Args:
        run_id: this run, which holds ``lease`` and has no ledger yet.
        sink: the sink that this run writes to, as the checkpoint calls it; ``table`` if it
            publishes.

    Raises:
        CheckpointError: a file cannot be read; or it cannot be found out whether a dead run
            published. Then nothing was changed.
    """
    contents, publications = _open_publications(storage, run_id)
    if not publications:
        return contents
    published: list[tuple[Publication, Snapshot]] = []
    for name, publication in publications.items():
        records = unsettled(publication, contents.snapshot)
        if len(records) and _is_published(storage, name, publication, records, sink, table):
            published.append((publication, records))
    failpoint("run.settling")
    for publication, records in published:
        header = {"purpose": "publication", SUPERSEDES: [publication.run_id]}
        lease.check()
        storage.write_whole(new_run_id(), header, records.blocks())
        logger.info(
            "Run %s had published %d sources to %s and was killed before it committed that. They "
            "are committed now.",
            publication.run_id,
            len(records),
            publication.sink,
        )
    failpoint("run.settled")
    storage.publications().forget(*publications)
    return storage.committed_by_dead_runs(run_id) if published else contents


def _open_publications(
    storage: CheckpointBackend, run_id: str
) -> tuple[Contents, dict[str, Publication]]:
    """Read the checkpoint, and the publications of its dead runs.

    The names are listed before the contents are read. So a run that is not at work by the contents,
    and has a publication in the list, is dead: it did not begin since. The list has those of all
    runs that had a source in common with this one, for these were dead before it got its lease.
    What others record later is for a later run.
    """
    store = storage.publications()
    names = store.names()
    contents = storage.committed_by_dead_runs(run_id)
    publications = {name: store.read(name) for name, r in names.items() if r not in contents.live}
    return contents, {name: one for name, one in publications.items() if one is not None}


def _is_published(
    storage: CheckpointBackend,
    name: str,
    publication: Publication,
    records: Snapshot,
    sink: str,
    table: Table | None,
) -> bool:
    """Ask the table whether it has a publication that is on record, and was not committed.

    Raises:
        CheckpointError: the table cannot tell.
    """
    if sink != publication.sink or table is None:
        raise _undecided(
            storage,
            name,
            publication,
            records,
            f"this run writes to {sink}, and does not read that table. Run once with the sink of "
            "that run",
        )
    if not table.has_marks:
        logger.warning(
            "Run %s was killed as it published %d sources to %s, which has no place for a mark. "
            "They are processed again. If the rows of %s are in the table, all of these are, and "
            "will be there twice.",
            publication.run_id,
            len(records),
            sink,
            records.record(0).source_id,
        )
        return False
    mark = Mark(storage.identity(), publication.run_id, publication.number)
    try:
        return table.settle(mark, publication.position)
    except Exception as error:
        raise _undecided(
            storage,
            name,
            publication,
            records,
            f"the table cannot tell ({error}). Make it readable, and run again",
        ) from error


def _undecided(
    storage: CheckpointBackend,
    name: str,
    publication: Publication,
    records: Snapshot,
    why: str,
) -> CheckpointError:
    return CheckpointError(
        f"Run {publication.run_id} was killed as it published {len(records)} sources to "
        f"{publication.sink}. Whether their rows are there decides whether they are processed "
        f"again, and {why}. If that is not possible, look for the rows of "
        f"{records.record(0).source_id} in the table. If they are there, remove the rows of the "
        "sources that are not completed. Then, in either case, remove "
        f"{storage.publications().path_of(name)}, and run again."
    )
