"""The open publications of runs in a checkpoint: an object for each; see `core.publications`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_resume.checkpoint.objects import Objects
from ray_resume.errors import CheckpointError

if TYPE_CHECKING:
    from ray_resume.core.publications import Publication

__all__ = ["PublicationStore"]

_FOLDER = "publications"


class PublicationStore:
    """The publications that are on record: about to be published, or published and not committed.

    Raises:
        CheckpointError: every method, where the storage fails, or holds something else.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def write(self, publication: Publication) -> None:
        """Put a publication on record; durable when this returns."""
        self._objects.put(_name(publication.run_id, publication.number), publication.to_bytes())

    def names(self) -> dict[str, str]:
        """List the publications on record by name: the run of each, in order."""
        names = sorted(self._objects.list(_FOLDER))
        return {name: name.removeprefix(f"{_FOLDER}/").rpartition("-")[0] for name in names}

    def read(self, name: str) -> Publication | None:
        """Return a publication; None if it was forgotten since it was listed."""
        # Imported here, because it loads pyarrow.
        from ray_resume.core.publications import Publication

        data = self._objects.get(name)
        if data is None:
            return None
        try:
            publication = Publication.from_bytes(data)
            if _name(publication.run_id, publication.number) != name:
                raise ValueError("it is of another run")
        except (ValueError, CheckpointError) as error:
            raise CheckpointError(
                f"The checkpoint file {self.path_of(name)} cannot be read: {error}. It says which "
                "sources a run that died was about to publish to a table. Restore it from a copy. "
                "Or remove from the table the rows of the sources that are not completed, then "
                "remove this file, and run again."
            ) from error
        return publication

    def forget(self, *names: str) -> None:
        """Take publications off the record: they are committed, or were never published."""
        self._objects.delete(names)

    def forget_one(self, run_id: str, number: int) -> None:
        """Take one publication off the record."""
        self.forget(_name(run_id, number))

    def clear(self) -> None:
        """Forget all. Call this under a lease on everything."""
        self.forget(*self.names())

    def highest_sequence(self) -> int:
        """Return the highest sequence number in use in any publication, 0 if there is none."""
        every = filter(None, map(self.read, self.names()))
        return max((int(one.log.column("sequence").max()) for one in every), default=0)

    def path_of(self, name: str) -> str:
        """Return where a publication is kept, for messages."""
        return f"{self._objects.uri}/{name}"


def _name(run_id: str, number: int) -> str:
    return f"{_FOLDER}/{run_id}-{number:06}"
