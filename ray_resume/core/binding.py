"""Which sources have output that is to stay, so that its types bind a run. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ray_resume.core.digests import Digests, source_digest
from ray_resume.core.record_log import Flag
from ray_resume.core.records import State
from ray_resume.core.resume_plan import Todo
from ray_resume.core.snapshot import Snapshot

__all__ = ["binding_sources", "gone_sources"]


def binding_sources(union: Snapshot, todo: Todo) -> npt.NDArray[np.bool_]:
    """Say of each row of ``union`` whether its source stays as it is, whatever ``todo`` reads."""
    stays = union.in_state(State.COMPLETED)
    stays |= union.column("flags") & Flag.FILES != 0
    again = union.find(todo.pending.digests)
    stays[again[again >= 0]] = False
    stays[todo.removed.rows] = False
    return stays


def gone_sources(
    source_ids: Iterable[str], union: Snapshot, stays: npt.NDArray[np.bool_]
) -> frozenset[str]:
    """Return those of ``source_ids`` that have no output which ``stays``."""
    ids = list(source_ids)
    rows = union.find(Digests.of(b"".join(map(source_digest, ids))))
    return frozenset(
        source_id
        for source_id, row in zip(ids, rows.tolist(), strict=True)
        if row < 0 or not stays[row]
    )
