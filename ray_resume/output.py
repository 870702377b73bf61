"""Where a run's rows go, as the run sees it: what to check before, and what to clean up after.

The bytes are written by `sink` and `datasinks`, on workers; this is the driver's side.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from ray_resume.contents import Contents
from ray_resume.errors import CheckpointError
from ray_resume.faults import reached
from ray_resume.naming import OutputName
from ray_resume.record import Record
from ray_resume.sink import Folder
from ray_resume.storage import Storage

__all__ = ["FolderOutput", "Output", "RemoteOutput"]


class Output(Protocol):
    """The output of a run. The checkpoint is bound to its ``uri``."""

    @property
    def uri(self) -> str:
        """What names it in the checkpoint and in messages."""

    def names(self) -> Collection[str]:
        """List the files in it, by their path in it; none if nobody can."""

    def check(
        self,
        checkpoint_id: str,
        checkpoint: Storage,
        names: Collection[str],
        contents: Contents,
        skipped: Iterable[Record],
    ) -> None:
        """Make sure that it can be written to, and that ``skipped`` sources' rows are there.

        Args:
            names: the files in it, listed under the run's lease and before ``contents`` was read.

        Raises:
            CheckpointError: it is not so; nothing was changed.
        """

    def prepare(self) -> None:
        """Make it ready for the first row.

        Raises:
            CheckpointError: it cannot be made.
        """

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

    def names(self) -> Collection[str]:
        try:
            return self.folder.names()
        except OSError as error:
            raise self._unusable(error) from error

    def check(
        self,
        checkpoint_id: str,
        checkpoint: Storage,
        names: Collection[str],
        contents: Contents,
        skipped: Iterable[Record],
    ) -> None:
        inside = checkpoint.root.removeprefix(f"{self.folder.path.rstrip('/')}/") + "/"
        names = [name for name in names if not name.startswith(inside)]
        known = contents.headers.keys() | contents.live.keys()
        unknown = [
            name
            for name in names
            if (parsed := OutputName.parse(name)) is not None
            and parsed.checkpoint == checkpoint_id
            and parsed.run_id not in known
        ]
        if unknown:
            raise CheckpointError(
                f"The output folder {self.uri} has {len(unknown)} files of runs that the "
                f"checkpoint {checkpoint.uri} does not know, {unknown[0]} among them: a writer's "
                "file (.mdb) was removed from it, or it was restored from an older copy. Going on "
                "would write their rows a second time. Put it back, or remove those files too."
            )
        if not self.append:
            foreign = [name for name in names if _is_foreign(name, checkpoint_id)]
            if foreign:
                raise CheckpointError(
                    f"The output folder {self.uri} has {len(foreign)} files that this checkpoint "
                    f"did not make, {foreign[0]} among them. Give an empty folder, or pass "
                    "append=True to write beside them."
                )
        present = set(names)
        gone = {
            f"{self.uri}/{file}": record.source_id
            for record in skipped
            for file in record.files
            if file not in present
        }
        if gone:
            file, source_id = next(iter(gone.items()))
            sources = sorted(set(gone.values()))
            some = repr(sources) if len(sources) <= 10 else "[... all of them ...]"
            raise CheckpointError(
                f"{len(gone)} output files of {len(sources)} completed sources are gone, {file} of "
                f"{source_id} among them. Put them back, or make ray_resume process the sources "
                f"again: Checkpoint({checkpoint.uri!r}).reset({some}), or "
                ".reset(state='completed') for all that is completed."
            )

    def prepare(self) -> None:
        try:
            self.folder.create()
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"The output folder {self.uri} cannot be used: {error}. Give a path where this process "
            "may make a folder, or mend the disk, and run again."
        )

    def remove_leftovers(
        self, checkpoint_id: str, runs: Collection[str], contents: Contents
    ) -> None:
        listed = {file for record in contents.union for file in record.files}
        for name in self.folder.names():
            parsed = OutputName.parse(name)
            if (
                parsed is not None
                and parsed.checkpoint == checkpoint_id
                and parsed.run_id in runs
                and name not in listed
            ):
                reached("cleanup.removing")
                self.folder.remove(name)
                reached("cleanup.removed")


@dataclass(frozen=True)
class RemoteOutput:
    """A system that a datasink or a UDF writes to: nothing of it can be seen from here."""

    uri: str

    def names(self) -> Collection[str]:
        return ()

    def check(
        self,
        checkpoint_id: str,
        checkpoint: Storage,
        names: Collection[str],
        contents: Contents,
        skipped: Iterable[Record],
    ) -> None:
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
    parsed = OutputName.parse(name)
    return parsed is None or parsed.checkpoint != checkpoint_id
