"""Where a run's rows go, as the run sees it: what to check before, and what to clean up after.

The bytes are written by `sink` and `datasinks`, on workers; this is the driver's side.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from ray_resume.directory import Contents
from ray_resume.errors import CheckpointError
from ray_resume.record import Record
from ray_resume.sink import Folder, OutputName

__all__ = ["FolderOutput", "Output", "RemoteOutput"]


class Output(Protocol):
    """The output of a run. The checkpoint is bound to its ``uri``."""

    @property
    def uri(self) -> str:
        """What names it in the checkpoint and in messages."""

    def check(self, checkpoint_id: str, checkpoint: str, skipped: Iterable[Record]) -> None:
        """Make sure that it can be written to, and that ``skipped`` sources' rows are there.

        Raises:
            CheckpointError: it is not so; nothing was changed.
        """

    def prepare(self) -> None:
        """Make it ready for the first row."""

    def remove_leftovers(
        self, checkpoint_id: str, runs: Collection[str], contents: Contents
    ) -> None:
        """Remove what ``runs``, all of them over, have left and no record lists."""


@dataclass(frozen=True)
class FolderOutput:
    """A folder of files; ``append`` allows other people's files beside ours."""

    folder: Folder
    append: bool

    @property
    def uri(self) -> str:
        return self.folder.uri

    def check(self, checkpoint_id: str, checkpoint: str, skipped: Iterable[Record]) -> None:
        names = self.folder.names()
        if not self.append:
            foreign = [name for name in names if _is_foreign(name, checkpoint_id)]
            if foreign:
                raise CheckpointError(
                    f"The output folder {self.uri} has {len(foreign)} files that this checkpoint "
                    f"did not make, {foreign[0]} among them. Give an empty folder, or pass "
                    "append=True to write beside them."
                )
        present = set(names)
        for record in skipped:
            for file in record.files:
                if file not in present:
                    raise CheckpointError(
                        f"The output file {self.uri}/{file} of the completed source "
                        f"{record.source_id} is gone. Put it back, or make ray_resume process the "
                        f"source again: Checkpoint({checkpoint!r}).reset([{record.source_id!r}])."
                    )

    def prepare(self) -> None:
        self.folder.create()

    def remove_leftovers(
        self, checkpoint_id: str, runs: Collection[str], contents: Contents
    ) -> None:
        listed = {file for record in contents.union for file in record.files}
        for name in self.folder.names():
            parsed = OutputName.parse(name.rsplit("/", 1)[-1])
            if (
                parsed is not None
                and parsed.checkpoint == checkpoint_id
                and parsed.run_id in runs
                and name not in listed
            ):
                self.folder.remove(name)


@dataclass(frozen=True)
class RemoteOutput:
    """A system that a datasink or a UDF writes to: nothing of it can be seen from here."""

    uri: str

    def check(self, checkpoint_id: str, checkpoint: str, skipped: Iterable[Record]) -> None:
        return

    def prepare(self) -> None:
        return

    def remove_leftovers(
        self, checkpoint_id: str, runs: Collection[str], contents: Contents
    ) -> None:
        return


def _is_foreign(name: str, checkpoint_id: str) -> bool:
    if any(part.startswith((".", "_")) for part in name.split("/")):
        return False
    parsed = OutputName.parse(name.rsplit("/", 1)[-1])
    return parsed is None or parsed.checkpoint != checkpoint_id
