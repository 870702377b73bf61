"""`Upstream`: the checkpoint of a pipeline whose output is another pipeline's input."""

from __future__ import annotations

from dataclasses import dataclass

from ray_resume.checkpoint.location import Location
from ray_resume.checkpoint.rebinding import NO_FOLDER
from ray_resume.core.sources import SourceTable
from ray_resume.core.upstream import sources_with_output
from ray_resume.errors import CheckpointError, NonResumableError

__all__ = ["Upstream"]


@dataclass(frozen=True)
class Upstream:
    """A checkpoint, to read the output of its pipeline. Picklable; it changes nothing there.

    Raises:
        CheckpointError: every method, where the checkpoint is missing or cannot be read.
    """

    location: Location

    @property
    def uri(self) -> str:
        """The checkpoint, as a user would write it, without secrets."""
        return self.location.open().uri

    def folder(self) -> str:
        """Return the path or URI of the folder that the pipeline writes to.

        Raises:
            CheckpointError: no run of the pipeline has begun to write.
            NonResumableError: it writes to no folder.
        """
        storage = self.location.open()
        bound = storage.sink()
        if bound is None:
            raise CheckpointError(
                f"The pipeline of the checkpoint {storage.uri} has written nothing yet, so there "
                "is nothing to read. Run it first; or is the path right?"
            )
        if bound.startswith(NO_FOLDER):
            raise NonResumableError(
                f"The pipeline of the checkpoint {storage.uri} writes to {bound}, and only the "
                "files of a folder can be read source by source. Have it write to a folder "
                "(resumable_write(ds, 'folder/')), and read its checkpoint then; or read the "
                "table by keys: resumable_read(load, keys=[...], checkpoint=...)."
            )
        return bound

    def sources(self) -> SourceTable:
        """Return the sources that have output now, by any run: see `core.upstream`."""
        return sources_with_output(self.location.open().snapshot().snapshot)
