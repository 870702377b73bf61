"""Resets of sources: records that have the next run process the sources again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ray_resume.checkpoint.backend import CheckpointBackend, new_run_id
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.contents import Contents
from ray_resume.checkpoint.status import STATES, in_state
from ray_resume.core.records import Record, State, encode
from ray_resume.core.snapshot import Snapshot
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint

__all__ = ["reset", "reset_records"]


def reset(
    storage: CheckpointBackend,
    source_ids: Iterable[str] | None,
    state: str,
    *,
    dead_letters: bool = False,
    version: str | None = None,
) -> int:
    """Reset sources in one durable transaction; return how many.

    Args:
        source_ids: the sources; None for all in ``state``.
        state: as in `in_state`.
        dead_letters: of the sources in ``state``, only those with rows in dead letters.
        version: all sources that went through a UDF of this version.

    Raises:
        CheckpointError: an id is not on record, or a run is at work. Nothing was reset.
    """
    storage.identity()
    run_id = new_run_id()
    lease = storage.acquire(Owner.here(run_id), Claim(None), wait_s=storage.max_death_detection_s)
    try:
        contents = storage.committed_by_dead_runs(run_id)
        snapshot = contents.snapshot
        if version is not None:
            records = list(_of_version(contents, version, storage.uri))
        elif source_ids is None:
            records = list(
                in_state(snapshot, state, dead_letters=dead_letters, ends=not dead_letters)
            )
        else:
            records = list(_on_record(snapshot, list(source_ids), storage.uri))
        if records:
            # Records of an open publication have their numbers already: the reset comes after them.
            highest = max(snapshot.highest_sequence(), storage.publications().highest_sequence())
            resets = reset_records(records, run_id, highest)
            # Imported here, because the command must start quickly.
            from ray_resume.core.identity import HEADER_KEY, ids_in_headers

            # Their output stays, so the way in which their ids were made stays on record, too.
            ids = ids_in_headers(contents.headers, {record.run_id for record in records})
            header = {"purpose": "reset", HEADER_KEY: sorted(ids)}
            storage.write_whole(run_id, header, encode(resets))
            failpoint("reset.committed")
            lease.check()
        if source_ids is None and state == "all" and not dead_letters and version is None:
            storage.read_schemas().clear()
            storage.publications().clear()
        return sum(record.end is None for record in records)
    finally:
        lease.end(wait_s=0)


def reset_records(records: Iterable[Record], run_id: str, highest_sequence: int) -> list[Record]:
    """Return the records of run ``run_id`` that reset the sources of ``records``."""
    return [
        Record(
            source_id=record.source_id,
            state=State.RESET,
            sequence=sequence,
            run_id=run_id,
            # They stay until a completed record replaces them; rows in a table stay for good.
            rows=record.rows,
            parts=record.parts,
            dead_letters=record.dead_letters,
            fingerprint=record.fingerprint,
        )
        for sequence, record in enumerate(records, highest_sequence + 1)
    ]


def _of_version(contents: Contents, version: str, checkpoint: str) -> Iterator[Record]:
    snapshot = contents.snapshot
    # Imported here, because the command must start quickly.
    from ray_resume.core.versions import completed_by_version, is_of_version

    chosen = is_of_version(snapshot, contents.headers, version)
    if not chosen.any():
        known = ", ".join(map(repr, completed_by_version(snapshot, contents.headers))) or "none"
        raise CheckpointError(
            f"No source in the checkpoint {checkpoint} went through the version {version!r}. The "
            f"versions of completed sources: {known}. Nothing was reset."
        )
    chosen &= snapshot.in_state(*STATES.values())
    return iter(snapshot.records(np.flatnonzero(chosen)))


def _on_record(snapshot: Snapshot, source_ids: Iterable[str], checkpoint: str) -> Iterator[Record]:
    known = {source_id: snapshot.get(source_id) for source_id in source_ids}
    unknown = [source_id for source_id, record in known.items() if record is None]
    if unknown:
        raise CheckpointError(
            f"The checkpoint {checkpoint} has no record of {unknown[0]!r}"
            + (f" and {len(unknown) - 1} others" if len(unknown) > 1 else "")
            + ". Nothing was reset. Checkpoint.sources() lists the ids; are these the same?"
        )
    return (r for r in known.values() if r is not None and r.state is not State.RESET)
