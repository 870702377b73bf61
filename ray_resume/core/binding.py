"""Which sources have output that is to stay, so that its types bind a run. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ray_resume.core.digests import Digests, source_digest
from ray_resume.core.record_log import Flag
from ray_resume.core.records import State
from ray_resume.core.resume_plan import ResumePlan
from ray_resume.core.snapshot import Snapshot

__all__ = ["binding_sources", "gone_sources"]


def binding_sources(snapshot: Snapshot, resume_plan: ResumePlan) -> npt.NDArray[np.bool_]:
    """Return for each row of ``snapshot`` whether its source stays, whatever the run reads."""
    stays = snapshot.in_state(State.COMPLETED)
    stays |= snapshot.column("flags") & Flag.FILES != 0
    again = snapshot.find(resume_plan.pending.digests)
    stays[again[again >= 0]] = False
    stays[resume_plan.removed.rows] = False
    return stays


def gone_sources(
    source_ids: Iterable[str], snapshot: Snapshot, stays: npt.NDArray[np.bool_]
) -> frozenset[str]:
    """Return those of ``source_ids`` that have no output which ``stays``."""
    ids = list(source_ids)
    rows = snapshot.find(Digests.of(b"".join(map(source_digest, ids))))
    return frozenset(
        source_id
        for source_id, row in zip(ids, rows.tolist(), strict=True)
        if row < 0 or not stays[row]
    )
