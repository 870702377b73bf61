"""The directory of this host alone that a shared checkpoint uses, and what tells hosts apart.

LMDB files and locks stand there. A lock in it proves to a process of this host that a run is dead.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Container
from pathlib import Path

from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.mounts import network_filesystem_type
from ray_resume.errors import CheckpointError

__all__ = ["boot_id", "make_scratch", "remove_dead_runs"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def make_scratch(checkpoint_id: str, uri: str) -> Path:
    """Return this host's directory for the checkpoint; make it if it is missing.

    Raises:
        CheckpointError: it cannot be made, or is on a network file system.
    """
    try:
        scratch = _own_directory() / checkpoint_id
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"The directory for this host's part of the checkpoint {uri} cannot be made: {error}. "
            "Set TMPDIR to a directory on a local disk with space, and run again."
        ) from error
    return scratch


def remove_dead_runs(scratch: Path, known: Container[str]) -> None:
    """Remove what dead runs of this host left in ``scratch``.

    A lock stays while its run is ``known``, because it proves the run dead.
    """
    for lock in scratch.glob("*.lease"):
        if lock.stem not in known and Lease.is_orphaned(lock):
            for path in (*scratch.glob(f"{lock.stem}.mdb*"), lock):
                with contextlib.suppress(OSError):
                    path.unlink()


def boot_id() -> str | None:
    """Return the id of this host's kernel since its last start; None where there is none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return None


def _own_directory() -> Path:
    """Return a directory of this user on this host; make it if it is missing."""
    user = Path(tempfile.gettempdir(), f"ray_resume-{os.getuid()}")
    if (kind := network_filesystem_type(user)) is not None:
        raise CheckpointError(
            f"The directory {user} for this host's part of a checkpoint is on a network file "
            f"system ({kind}), where LMDB and locks cannot be trusted. Set TMPDIR to a directory "
            "on a local disk, and run again."
        )
    with contextlib.suppress(FileExistsError):
        user.mkdir(mode=0o700)
    about = user.lstat()
    if about.st_uid != os.getuid() or about.st_mode & 0o077 or user.is_symlink():
        # Another user could put files there.
        user = Path(tempfile.mkdtemp(prefix="ray_resume-"))
    return user
