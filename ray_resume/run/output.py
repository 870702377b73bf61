"""`Output`: the output of a run, as the driver sees it: it verifies and cleans the output.

Workers write the rows (`write.file_sink`, `write.datasinks`).
"""

from __future__ import annotations

from collections.abc import Collection

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.contents import Contents
from ray_resume.core.snapshot import Records

__all__ = ["Output"]


class Output:
    """The output of a run: by default a system that a datasink or a UDF writes to.

    ray_resume can neither list nor remove what is in such a system. A folder of files overrides
    every method (`write.output.FolderOutput`).

    Args:
        uri: names the output in messages and in the checkpoint, which is bound to it.
    """

    replaces = False
    """Whether new output of a source takes the place of its old one."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def list_files(self) -> Collection[str]:
        """List the output's files by their relative path."""
        return ()

    def verify(
        self,
        checkpoint_id: str,
        checkpoint: CheckpointBackend,
        names: Collection[str],
        contents: Contents,
        skipped: Records,
    ) -> None:
        """Make sure that a run can write to the output, and that ``skipped`` sources' rows exist.

        Args:
            names: the output's files, listed under the run's lease and before ``contents`` was
                read.

        Raises:
            CheckpointError: the output cannot be used, or has lost files. Nothing was changed.
        """

    def prepare(self) -> None:
        """Make the output ready for the first row.

        Raises:
            CheckpointError: the output cannot be created.
        """

    def remove_leftovers(
        self,
        checkpoint_id: str,
        runs: Collection[str],
        contents: Contents,
        names: Collection[str] | None = None,
    ) -> None:
        """Remove the files of ``runs``, all of them over, that no record lists.

        Args:
            names: the output's files, if this run listed them under its lease and no worker has
                written for this run since.
        """
