"""`Objects`: the storage that holds a checkpoint, as whole objects by name.

The interface is small, because object stores offer no more. An object appears whole under its name
or not at all. A later read or listing sees it. It can be replaced or deleted. There is no locking,
no appending, and no "create unless it is there".

The implementations are `local.objects` and `shared.objects`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["ObjectInfo", "Objects"]


@dataclass(frozen=True)
class ObjectInfo:
    """An object in a listing. While both values stay the same, no process has replaced it."""

    size: int
    mtime_ns: int | None


class Objects(Protocol):
    """Objects by name. A name has "/" between its parts. Threads may call all methods.

    Attributes:
        uri: the storage, as a user would write it, without secrets.
        path: the storage, as its filesystem writes it.

    Raises:
        CheckpointError: every method, where the storage fails or refuses for good.
    """

    @property
    def uri(self) -> str: ...

    @property
    def path(self) -> str: ...

    def put(self, name: str, data: bytes) -> None:
        """Add an object that was not there. It is durable and visible when this returns."""

    def replace(self, name: str, data: bytes) -> None:
        """Put ``data`` in place of an object. A reader may meanwhile see either, or a part."""

    def get(self, name: str) -> bytes | None:
        """Return an object, None if it is missing."""

    def get_all(self, names: Sequence[str]) -> Iterator[bytes | None]:
        """Return many objects in the order of ``names``, in parallel where that is faster."""

    def list(self, folder: str, *, hidden: bool = False) -> Mapping[str, ObjectInfo]:
        """List the objects in and below ``folder`` by name; none if it is missing.

        Args:
            hidden: also list what killed processes left half-written.

        Guarantees: each object that was put before this call, and is not deleted, is listed.
        """

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects. It is no error if some are missing."""
