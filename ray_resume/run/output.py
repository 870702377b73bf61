"""Where a run's rows go, as the run sees it: what to check before, and what to clean up after.

The bytes are written by `sink` and `datasinks`, on workers; this is the driver's side.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from ray_resume.checkpoint.contents import Contents
from ray_resume.checkpoint.storage import Storage
from ray_resume.core.output_files import FileList, listed_files, missing_files
from ray_resume.core.snapshot import Records
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import reached
from ray_resume.write.folder import Folder, fault_of

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
        skipped: Records,
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
        self,
        checkpoint_id: str,
        runs: Collection[str],
        contents: Contents,
        names: Collection[str] | None = None,
    ) -> None:
        """Remove what ``runs``, all of them over, have left and no record lists.

        Args:
            names: the files in it, if they were listed under this run's lease, and nobody wrote
                for this run since.
        """


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
            return FileList.of(self.folder.names())
        except OSError as error:
            raise self._unusable(error) from error

    def check(
        self,
        checkpoint_id: str,
        checkpoint: Storage,
        names: Collection[str],
        contents: Contents,
        skipped: Records,
    ) -> None:
        inside = checkpoint.root.removeprefix(f"{self.folder.path.rstrip('/')}/") + "/"
        present = FileList.of(names)
        present = FileList(
            present.usual, [name for name in present.others if not name.startswith(inside)]
        )
        known = contents.headers.keys() | contents.live.keys()
        unknown = present.made_by(checkpoint_id, known, known=False)
        if unknown:
            raise CheckpointError(
                f"The output folder {self.uri} has {len(unknown)} files of runs that the "
                f"checkpoint {checkpoint.uri} does not know, {next(iter(unknown))} among them: a "
                "writer's file (.mdb) was removed from it, or it was restored from an older copy. "
                "Going on would write their rows a second time. Put it back, or remove those files "
                "too."
            )
        if not self.append:
            foreign = [name for name in present.not_of(checkpoint_id) if not _is_hidden(name)]
            if foreign:
                raise CheckpointError(
                    f"The output folder {self.uri} has {len(foreign)} files that this checkpoint "
                    f"did not make, {foreign[0]} among them. Give an empty folder, or pass "
                    "append=True to write beside them."
                )
        gone = {
            f"{self.uri}/{file}": source_id for file, source_id in missing_files(skipped, present)
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
        fault, remedy = fault_of(error)
        return CheckpointError(
            f"The output folder {self.uri} cannot be used: {error}. {fault} {remedy}, and run "
            "again."
        )

    def remove_leftovers(
        self,
        checkpoint_id: str,
        runs: Collection[str],
        contents: Contents,
        names: Collection[str] | None = None,
    ) -> None:
        there = FileList.of(self.folder.names() if names is None else names)
        left = there.made_by(checkpoint_id, runs, known=True)
        # The records are looked at only where there is something that they may list.
        for name in left.without(listed_files(contents.union)) if left else ():
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
        skipped: Records,
    ) -> None:
        return

    def prepare(self) -> None:
        return

    def remove_leftovers(
        self,
        checkpoint_id: str,
        runs: Collection[str],
        contents: Contents,
        names: Collection[str] | None = None,
    ) -> None:
        return


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))
