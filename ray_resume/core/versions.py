"""Which sources went through which version of a UDF, ``@resumable(version=...)``. Pure.

A run notes the versions in the header of its file, beside its pipeline's signature. A record has
the hash of that signature, so records need nothing more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_resume.core.records import State, pipeline_hash
from ray_resume.core.snapshot import Snapshot

__all__ = ["HEADER_KEY", "completed_by_version", "is_of_version"]

HEADER_KEY = "versions"
"""Where a run's header lists the versions of its UDFs."""

Headers = Mapping[str, Mapping[str, Any]]


def completed_by_version(snapshot: Snapshot, headers: Headers) -> dict[str, int]:
    """Count the completed sources of each version; one of two versioned UDFs counts for both."""
    completed = snapshot.in_state(State.COMPLETED)
    counts = {
        version: int(np.count_nonzero(completed & _is_of(snapshot, pipelines)))
        for version, pipelines in sorted(_pipelines(headers).items())
    }
    return {version: count for version, count in counts.items() if count}


def is_of_version(snapshot: Snapshot, headers: Headers, version: str) -> npt.NDArray[np.bool_]:
    """Say of each record whether its source went through a UDF of this version."""
    return _is_of(snapshot, _pipelines(headers).get(version, ()))


def _pipelines(headers: Headers) -> dict[str, set[bytes]]:
    """Return the hashes of the signatures, of four bytes, by the versions in their pipelines."""
    found: dict[str, set[bytes]] = {}
    for header in headers.values():
        signature, versions = header.get("signature"), header.get(HEADER_KEY, ())
        if isinstance(signature, str) and isinstance(versions, (list, tuple)):
            for version in versions:
                found.setdefault(str(version), set()).add(pipeline_hash(signature)[:4])
    return found


def _is_of(snapshot: Snapshot, pipelines: Collection[bytes]) -> npt.NDArray[np.bool_]:
    hashes = np.frombuffer(b"".join(pipelines), np.uint32)
    mask: npt.NDArray[np.bool_] = np.isin(snapshot.column("pipeline")[:, 0], hashes)
    return mask
