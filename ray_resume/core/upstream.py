"""The sources of another pipeline, as the input of the next one. Pure.

They are those that have output: completed ones, and those that failed since and keep their earlier
output. Each keeps its id, and is found by its parts, which say where its rows are in output files.
Its fingerprint stands for what it holds: the run that made its record, and whether the source is
complete by it. A run completes a source once, perhaps after it has recorded that the source got
lost. A rewrite, a merge or a change of types keeps both and changes the parts alone. So a source
that was executed again has another fingerprint; one whose file was rewritten has the same.
"""

from __future__ import annotations

import hashlib

import numpy as np

from ray_resume.core.columns import numbers_of
from ray_resume.core.digests import DigestIndex
from ray_resume.core.part_lists import PartLists, Parts
from ray_resume.core.record_log import Flag
from ray_resume.core.records import State
from ray_resume.core.snapshot import Snapshot
from ray_resume.core.sources import SourceTable

__all__ = ["moved_parts", "sources_with_output"]

_COLUMNS = ["source_id", "run_id", "state", "files", "first_rows", "part_rows", "file_rows"]


def sources_with_output(snapshot: Snapshot) -> SourceTable:
    """Return the sources of a pipeline that have output, each found by its live parts.

    Neighbors in a file are neighbors here, so that what reads them in order reads a file once.
    A source that was reset is not among them, although its files stay for now.
    """
    has_files = snapshot.column("flags") & Flag.FILES != 0
    failed = snapshot.in_state(State.FAILED, State.QUARANTINED) & has_files
    completed = snapshot.in_state(State.COMPLETED)
    completed &= snapshot.column("flags") & Flag.END == 0
    rows = np.flatnonzero(completed | failed)
    batches = [batch.select(_COLUMNS) for _, batch in snapshot.batches(rows)]
    ids: list[bytes] = []
    contents: list[int] = []
    known: dict[tuple[bytes, bool], int] = {}
    for batch in batches:
        ids += batch.column("source_id").to_pylist()
        complete = numbers_of(batch.column("state"), "u1") == State.COMPLETED.value
        for made in zip(batch.column("run_id").to_pylist(), complete.tolist(), strict=True):
            content = known.get(made)
            if content is None:
                content = known[made] = _content(*made)
            contents.append(content)
    parts = PartLists.of(batches)
    table = SourceTable.of_parts(ids, parts, contents, snapshot.digests.take(rows))
    return table.take(parts.order())


def moved_parts(listed: SourceTable, now: SourceTable) -> dict[str, Parts | None]:
    """Return the parts of the sources whose rows are elsewhere than when they were ``listed``.

    None stands for a source that holds other rows ``now``, or has no output any more.
    """
    index = DigestIndex(now.digests)
    ranks = index.positions(listed.digests)
    known = np.flatnonzero(ranks >= 0)
    newest = now.take(index.order[ranks[known]])
    before = listed.take(known)
    then, since = before.part_lists, newest.part_lists
    assert then is not None
    assert since is not None
    same = before.fingerprints.mtimes_ns == newest.fingerprints.mtimes_ns
    moved: dict[str, Parts | None] = {
        listed.id(n): None for n in np.flatnonzero(ranks < 0).tolist()
    }
    moved.update((before.id(n), None) for n in np.flatnonzero(~same).tolist())
    elsewhere = np.flatnonzero(same & then.differs(since))
    moved.update((before.id(n), since[n]) for n in elsewhere.tolist())
    return moved


def _content(run_id: bytes, complete: bool) -> int:
    """Return 63 bits that stand for the rows of each source that a run has recorded so."""
    digest = hashlib.blake2b(run_id if complete else run_id + b" kept", digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
