"""The sources that runs have listed, in a checkpoint: for reports, which no run relies on.

An object holds the digests of one listing, and its name is a digest of these. So the many runs of
an array share one object, and a run that lists what the last one listed writes nothing.
"""

from __future__ import annotations

import hashlib

from ray_resume.checkpoint.objects import Objects
from ray_resume.core.digests import Digests
from ray_resume.errors import CheckpointError

__all__ = ["ListingStore"]

_FOLDER = "listings"


class ListingStore:
    """The listings that count: that of the newest run, and those of runs that were beside it.

    Raises:
        CheckpointError: every method, where the storage fails, or holds something else.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def read(self) -> Digests | None:
        """Return the digests of the sources that are listed, each once; None before any listing."""
        while True:
            found = {name: self._objects.get(name) for name in self._objects.list(_FOLDER)}
            listings = [
                self._checked(name, data) for name, data in found.items() if data is not None
            ]
            # A run may have removed some of them just now, once it had recorded its own.
            if len(listings) == len(found):
                return Digests.joined(listings).distinct() if listings else None

    def _checked(self, name: str, data: bytes) -> Digests:
        if _name(data) != name:
            raise CheckpointError(
                f"The checkpoint file {self._objects.uri}/{name} is damaged. It only says which "
                "sources a run has listed. Remove it: the next run writes it again."
            )
        return Digests.of(data)

    def is_only(self, listed: Digests) -> bool:
        """Say whether ``listed`` are on record, and no others."""
        return list(self._objects.list(_FOLDER)) == [_name(listed.to_bytes())]

    def add(self, listed: Digests) -> None:
        """Record ``listed`` beside what is there; durable when this returns."""
        data = listed.to_bytes()
        name = _name(data)
        if name not in self._objects.list(_FOLDER):
            self._objects.replace(name, data)

    def remove_others(self, listed: Digests) -> None:
        """Remove all listings but ``listed``. Call this while no other run is at work."""
        own = _name(listed.to_bytes())
        self._objects.delete(name for name in self._objects.list(_FOLDER) if name != own)


def _name(data: bytes) -> str:
    return f"{_FOLDER}/{hashlib.blake2b(data, digest_size=16).hexdigest()}.digests"
