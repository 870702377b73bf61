"""Bind a checkpoint to another folder, to which a user moved its output.

A checkpoint belongs to one output folder, and refuses a run that would write to another. Records
list files by their path in the folder, so no record depends on where the folder is.
"""

from __future__ import annotations

import numpy as np

from ray_resume.checkpoint.backend import CheckpointBackend, new_run_id
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.core.output_files import OutputFileSet, listed_files, missing_files
from ray_resume.core.records import State
from ray_resume.errors import CheckpointError
from ray_resume.write.folder import Folder

__all__ = ["NO_FOLDER", "output_folder", "rebind"]

_EXAMPLES = 10
# The name of an output that is no folder begins so.
NO_FOLDER = ("datasink ", "sink=True: ")


def output_folder(storage: CheckpointBackend) -> str:
    """Return the path or URI of the folder that a checkpoint is bound to.

    Raises:
        CheckpointError: it has no output yet, or its output is no folder.
    """
    bound = storage.sink()
    if bound is None or bound.startswith(NO_FOLDER):
        what = "has no output yet" if bound is None else f"belongs to {bound}, which is no folder"
        raise CheckpointError(f"The checkpoint {storage.uri} {what}. There is nothing to do.")
    return bound


def rebind(storage: CheckpointBackend, folder: Folder) -> int:
    """Bind ``storage`` to ``folder``; return how many output files are listed.

    Raises:
        CheckpointError: a file of a completed source is not in ``folder``, a run is at work, or
            the checkpoint has no output folder. Nothing was changed.
    """
    storage.identity()
    bound = output_folder(storage)
    run_id = new_run_id()
    lease = storage.acquire(Owner.here(run_id), Claim(None), wait_s=storage.max_death_detection_s)
    try:
        snapshot = storage.committed_by_dead_runs(run_id).snapshot
        try:
            there = OutputFileSet.of(folder.list_files())
        except OSError as error:
            raise CheckpointError(
                f"The folder {folder.uri} cannot be listed: {error}. Nothing was changed."
            ) from error
        completed = snapshot.records(np.flatnonzero(snapshot.in_state(State.COMPLETED)))
        missing = sorted(dict(missing_files(completed, there)))
        if missing:
            more = f", and {len(missing) - _EXAMPLES} more" if len(missing) > _EXAMPLES else ""
            raise CheckpointError(
                f"{len(missing)} output files of completed sources are not in {folder.uri}: "
                f"{', '.join(missing[:_EXAMPLES])}{more}. Is it the folder that was {bound}? Move "
                "all of its files, with their subfolders, and try again. Nothing was changed."
            )
        lease.check()
        storage.bind(folder.uri, run_id)
        return len(listed_files(snapshot))
    finally:
        lease.end(wait_s=0)
