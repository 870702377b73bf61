"""Leases of a local checkpoint, held here and by processes that are killed."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.core.digests import source_digest
from ray_resume.errors import CheckpointError

EVERYTHING = Claim(None)


def claim(*source_ids: str) -> Claim:
    return Claim(frozenset(map(source_digest, source_ids)))


def acquire(
    directory: Path, run_id: str, what: Claim = EVERYTHING, *, wait_s: float = 0.0
) -> Lease:
    return Lease.acquire(directory, Owner.here(run_id), what, wait_s=wait_s)


def is_free(directory: Path, what: Claim = EVERYTHING) -> bool:
    """Say whether a run with this claim could start now."""
    try:
        acquire(directory, "probe", what).end(wait_s=0)
    except CheckpointError:
        return False
    return True


def kill(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()


HOLD = """
import sys
from pathlib import Path
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.lease import Lease

lease = Lease.acquire(Path(sys.argv[1]), Owner.here("holder"), Claim(None), wait_s=0)
print("held", flush=True)
sys.stdin.read()
"""

JOIN = """
import sys
from pathlib import Path
from ray_resume.checkpoint.local.lease import Lease

lease = Lease.join(Path(sys.argv[1]) / "holder.lease")
print("joined", flush=True)
sys.stdin.read()
"""
