"""A folder of files as a run's output: verified before the run, cleaned up after it.

Runs in the driver. `file_sink` writes the files, on workers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection

from typing_extensions import override

from ray_resume.checkpoint.backend import CheckpointBackend
from ray_resume.checkpoint.contents import Contents
from ray_resume.core.filenames import OutputName
from ray_resume.core.output_files import OutputFileSet, listed_files, missing_files
from ray_resume.core.snapshot import Records, Snapshot
from ray_resume.core.wording import counted
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint
from ray_resume.run.output import Output
from ray_resume.write.folder import Folder, fault_of

__all__ = ["FolderOutput"]

logger = logging.getLogger("ray_resume")


class FolderOutput(Output):
    """A folder of files.

    Args:
        append: files that ray_resume did not make may be in the folder.

    Attributes:
        seen_at_end: the records by which a run removed leftovers at its end.
    """

    replaces = True

    def __init__(self, folder: Folder, *, append: bool) -> None:
        super().__init__(folder.uri)
        self.folder = folder
        self.seen_at_end: Snapshot | None = None
        self.append = append

    @override
    def list_files(self) -> Collection[str]:
        try:
            return OutputFileSet.of(self.folder.list_files())
        except OSError as error:
            raise self._unusable(error) from error

    @override
    def verify(
        self,
        checkpoint_id: str,
        checkpoint: CheckpointBackend,
        names: Collection[str],
        contents: Contents,
        skipped: Records,
    ) -> None:
        inside = checkpoint.root.removeprefix(f"{self.folder.path.rstrip('/')}/") + "/"
        present = OutputFileSet.of(names)
        present = OutputFileSet(
            present.compact, [name for name in present.plain if not name.startswith(inside)]
        )
        known = contents.headers.keys() | contents.live.keys()
        unknown = present.made_by(checkpoint_id, known, known=False)
        if unknown:
            raise CheckpointError(
                f"The output folder {self.uri} has {len(unknown)} files of runs that the "
                f"checkpoint {checkpoint.uri} does not know, {next(iter(unknown))} among them. A "
                "writer's file (.mdb) was removed from it, or it was restored from an older copy. "
                "Going on would write their rows a second time. Put it back, or remove those files "
                "too."
            )
        self._check_foreign(checkpoint_id, checkpoint, present.not_of(checkpoint_id), contents)
        gone = list(missing_files(skipped, present))
        if gone:
            file, source_id = gone[0]
            files, sources = ({*column} for column in zip(*gone, strict=True))
            some = repr(sorted(sources)) if len(sources) <= 10 else "[... all of them ...]"
            raise CheckpointError(
                f"{counted(len(files), 'output file')} of "
                f"{counted(len(sources), 'completed source')} "
                f"{'is' if len(files) == 1 else 'are'} gone, {self.uri}/{file} of {source_id} "
                f"among them. Put them back, or make ray_resume process the sources "
                f"again: Checkpoint({checkpoint.uri!r}).reset({some}), or "
                ".reset(state='completed') for all that is completed."
            )

    def _check_foreign(
        self,
        checkpoint_id: str,
        checkpoint: CheckpointBackend,
        foreign: OutputFileSet,
        contents: Contents,
    ) -> None:
        """Make sure that files that this checkpoint did not make may be there.

        Raises:
            CheckpointError: they may not.
        """
        if not foreign:
            return
        # Where names had no tags, only a record tells which files are ours.
        foreign = foreign.without(listed_files(contents.snapshot))
        shown = [name for name in foreign if not _is_hidden(name)]
        others = OutputFileSet.of(shown).checkpoints()
        others.pop(checkpoint_id, None)
        if others:
            about = self._about_others(checkpoint_id, checkpoint, others, contents)
            if not self.append:
                rest = [name for name in shown if OutputName.parse(name) is None]
                raise CheckpointError(
                    f"{about} Pass the checkpoint that made them, by its absolute path. Or, to "
                    "start over, give an empty folder, or remove those files."
                    + (
                        f" Beside them are {len(rest)} files that ray_resume did not make, "
                        f"{rest[0]} among them: append=True is for such files alone."
                        if rest
                        else ""
                    )
                )
            if not contents.headers:
                logger.warning("%s append=True writes beside them.", about)
        elif shown and not self.append:
            raise CheckpointError(
                f"The output folder {self.uri} has {len(shown)} files that this checkpoint "
                f"did not make, {shown[0]} among them. Give an empty folder, or pass "
                "append=True to write beside them."
            )

    def _about_others(
        self,
        checkpoint_id: str,
        checkpoint: CheckpointBackend,
        others: Counter[str],
        contents: Contents,
    ) -> str:
        """Say that ray_resume made files for other checkpoints, and what that may mean."""
        ids = ", ".join(sorted(others)[:3])
        new = "is new: no run has used it" if not contents.headers else "is another one"
        return (
            f"The output folder {self.uri} has {others.total()} files that this checkpoint did not "
            f"make: ray_resume made them for the checkpoint with the id {ids}. The "
            f"checkpoint of this run, {checkpoint.uri} (id {checkpoint_id}), {new}. If the old one "
            "was removed, or a relative path leads elsewhere from this working directory, "
            "the same rows would be written a second time."
        )

    @override
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

    @override
    def remove_leftovers(
        self,
        checkpoint_id: str,
        runs: Collection[str],
        contents: Contents,
        names: Collection[str] | None = None,
    ) -> None:
        self.seen_at_end = contents.snapshot
        there = OutputFileSet.of(self.folder.list_files() if names is None else names)
        left = there.made_by(checkpoint_id, runs, known=True)
        # The records are looked at only where there is something that they may list.
        for name in left.without(listed_files(contents.snapshot)) if left else ():
            failpoint("cleanup.removing")
            self.folder.remove(name)
            failpoint("cleanup.removed")


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))
