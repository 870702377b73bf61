"""How a user writes a checkpoint down, and which kind of checkpoint that is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.identity import IDENTITY, SHARED_LAYOUT
from ray_resume.checkpoint.local.backend import LocalBackend, local_path
from ray_resume.checkpoint.mounts import network_filesystem_type
from ray_resume.files import public_uri

if TYPE_CHECKING:
    # Where no hosts share the checkpoint, the command needs nothing of it, and starts sooner.
    from ray_resume.checkpoint.shared.backend import SharedBackend
    from ray_resume.checkpoint.shared.objects import StoredObjects

__all__ = ["Location"]

_OBJECT_TTL_S = 30.0
# A client of a network file system may cache a listing for up to a minute.
_MOUNT_TTL_S = 120.0
_PUBLISH_INTERVAL_S = 5.0
_MIN_TTL_S = 2.0
# No thread can wait longer at once, and a dead run would be taken for alive for days.
_MAX_S = 86_400.0


@dataclass(frozen=True)
class Location:
    """A checkpoint, as its user writes it down; picklable. Making the object touches nothing.

    Args:
        path: a path, or a URI.
        filesystem: the pyarrow (or fsspec) filesystem that ``path`` is on.
        publish_interval_s: where hosts share the checkpoint: how long a completed source waits to
            be published.
        lease_ttl_s: likewise: how long a run's silence lasts until others declare it dead.
        shared: whether hosts share a directory that looks like a local disk.
    """

    path: str
    filesystem: Any = None
    publish_interval_s: float = _PUBLISH_INTERVAL_S
    lease_ttl_s: float | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.publish_interval_s <= _MAX_S:
            raise ValueError(
                f"publish_interval_s must be 0 to {_MAX_S:g} seconds, not {self.publish_interval_s}"
            )
        ttl_s = self.lease_ttl_s
        if ttl_s is not None and not _MIN_TTL_S <= ttl_s <= _MAX_S:
            raise ValueError(
                f"lease_ttl_s must be {_MIN_TTL_S:g} to {_MAX_S:g} seconds, not {ttl_s}"
            )

    @property
    def local_path(self) -> Path | None:
        """The directory, if it is on one of this host's file systems."""
        # A filesystem of fsspec has no type_name.
        if self.filesystem is not None and getattr(self.filesystem, "type_name", "") != "local":
            return None
        return local_path(self.path)

    def open(self) -> CheckpointBackend:
        """Return the checkpoint where it is kept.

        Raises:
            CheckpointError: pyarrow does not know the storage, or cannot reach it.
        """
        path = self.local_path
        if path is None:
            return self._of(self._objects(), _OBJECT_TTL_S)
        mounted = network_filesystem_type(path) is not None
        if not (self.shared or mounted or _is_shared(path)):
            return LocalBackend(path)
        from pyarrow.fs import LocalFileSystem

        from ray_resume.checkpoint.shared.objects import StoredObjects

        ttl_s = _MOUNT_TTL_S if mounted else _OBJECT_TTL_S
        return self._of(StoredObjects(LocalFileSystem(), str(path), str(path)), ttl_s)

    def _of(self, objects: StoredObjects, ttl_s: float) -> SharedBackend:
        from ray_resume.checkpoint.shared.backend import SharedBackend

        return SharedBackend(
            objects,
            ttl_s=self.lease_ttl_s or ttl_s,
            publish_interval_s=self.publish_interval_s,
        )

    def _objects(self) -> StoredObjects:
        # Imported here: a directory of this host needs no pyarrow.
        from ray_resume.checkpoint.shared.objects import StoredObjects
        from ray_resume.filesystems import open_uri

        filesystem, path = open_uri("checkpoint", self.path, self.filesystem)
        return StoredObjects(filesystem, path, public_uri(self.path))


def _is_shared(path: Path) -> bool:
    """Say whether hosts share the checkpoint in a directory: its identity tells."""
    try:
        return bool(json.loads((path / IDENTITY).read_bytes())["layout"] == SHARED_LAYOUT)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
