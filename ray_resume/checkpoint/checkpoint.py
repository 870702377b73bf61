"""`Checkpoint`: a checkpoint as its user sees it. It shows what is done and where the output is.

It works without Ray, in any process, also while a run is going on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from ray_resume.checkpoint.compaction import compact
from ray_resume.checkpoint.location import Location
from ray_resume.checkpoint.resets import reset
from ray_resume.checkpoint.status import STATES
from ray_resume.checkpoint.view import CheckpointView
from ray_resume.errors import CheckpointError

__all__ = ["Checkpoint"]


class Checkpoint(CheckpointView):
    """A checkpoint, to look at and to pass to ``resumable_read``.

    Nothing is created or read before a method is called.

    Args:
        path: a directory (``str``, ``Path``, or a ``file://`` URI), or a URI of a storage that
            pyarrow knows: ``s3://bucket/path``, ``gs://``, ``abfs://``, ``hdfs://``.
        filesystem: the pyarrow or fsspec filesystem that ``path`` is on; by default, that of the
            URI.
        publish_interval_s: in a storage that hosts share, a run publishes the *records* of complete
            sources after so many seconds at the latest. A crash costs these sources, beside those
            that were not complete. (On a local disk, a run commits them within 0.2 s.) How often
            *rows* are published to a table is an option of ``resumable_write``, of the same name.
        lease_ttl_s: in such a storage, a run without a heartbeat for so long is dead: 30 s by
            default on object stores, 120 s on network file systems. A run that cannot send one for
            three quarters of that commits nothing more. 2 s to a day; hosts may give different
            ones.
        shared: hosts share the directory, although it looks like a local disk. Network file
            systems are recognized without this.

    Raises:
        CheckpointError: every method, where the checkpoint is missing, unreadable or of another
            format; the message names the file and the way out.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        filesystem: Any = None,
        publish_interval_s: float = 5.0,
        lease_ttl_s: float | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__(
            path.location
            if isinstance(path, Checkpoint)
            else Location(os.fspath(path), filesystem, publish_interval_s, lease_ttl_s, shared)
        )

    def tidy(self, *, filesystem: Any = None) -> int:
        """Rewrite the output files that are not clean, and remove leftovers, as the next run would.

        Nothing is lost if it is killed at any moment: the old files are removed when the new ones
        are durable and on record, 16 GiB of files at a time. The disk needs room for so much. Files
        with sources of a run at work stay as they are; if all have such sources, this raises.

        Args:
            filesystem: the pyarrow filesystem that the output folder is on; by default, that of
                its URI.

        Returns:
            How many files were rewritten.

        Raises:
            CheckpointError: the output is no folder, a run is at work on sources of all these
                files, or a file cannot be read or written. No row is lost.
        """
        # The command must start quickly, and seldom needs what this loads.
        from ray_resume.checkpoint.rebinding import output_folder
        from ray_resume.write.folder import folder_at
        from ray_resume.write.tidying import copy_here, tidy_output

        folder = folder_at(output_folder(self._storage), filesystem)
        wait_s = self._storage.max_death_detection_s
        try:
            tidied = tidy_output(self._storage, folder, copy_here(folder), wait_s=wait_s)
        except OSError as error:
            raise CheckpointError(
                f"The output folder {folder.uri} cannot be tidied: {error}. No row is lost."
            ) from error
        return len(tidied.moved)

    def reset(
        self,
        source_ids: Iterable[str] | None = None,
        *,
        state: str | None = None,
        dead_letters: bool = False,
        version: str | None = None,
    ) -> int:
        """Reset sources, so that the next run processes them again; return how many.

        Their output files stay until that run has committed new ones in their place. A reset
        deletes nothing: it adds a record for each source, all in one durable transaction.

        Args:
            source_ids: the sources to reset, or a single id; or
            state: ``"completed"``, ``"failed"``, ``"quarantined"`` or ``"all"``: all sources in it;
                or
            dead_letters: all sources with rows in dead letters, once the UDF is mended. The letters
                stay until the next run has completed their source; or
            version: all sources that went through a UDF of this version
                (``@resumable(version=...)``).

        Raises:
            ValueError: none of them or several are given, or there is no such state.
            CheckpointError: an id or the version is not on record, or a run is at work. Nothing
                was reset.
        """
        ways = [source_ids is None, state is None, not dead_letters, version is None]
        if ways.count(False) != 1:
            raise ValueError(
                'reset needs the ids of sources, or a state ("all" for everything), or '
                "dead_letters=True, or a version"
            )
        if state is not None and state != "all" and state not in STATES:
            raise ValueError(f"state must be one of {', '.join(STATES)} or all, not {state!r}")
        if source_ids is not None:
            source_ids = [source_ids] if isinstance(source_ids, str) else list(source_ids)
        return reset(
            self._storage, source_ids, state or "all", dead_letters=dead_letters, version=version
        )

    def compact(self) -> int:
        """Merge the writers' files into one, so that reading the checkpoint stays quick.

        A kill at any moment loses nothing: the old files are removed once the new one is whole,
        durable and read back. Runs wait for it to end.

        Returns:
            How many files were merged; 0 if there is only one.

        Raises:
            CheckpointError: a run is at work, or a file cannot be read. Nothing was changed.
        """
        return compact(self._storage, lease_wait_s=self._storage.max_death_detection_s)

    def rebind(self, folder: str | os.PathLike[str], *, filesystem: Any = None) -> int:
        """Bind the checkpoint to ``folder``, where the output was moved to: later runs write there.

        Args:
            folder: a path or URI of the folder, with all of the files that were in the old one.
            filesystem: the pyarrow filesystem that it is on; by default, that of the URI.

        Returns:
            How many output files are listed.

        Raises:
            CheckpointError: files of completed sources are not there (the message names them), a
                run is at work, or there is no output folder yet. Nothing was changed.
        """
        # The command must start quickly, and seldom needs what this loads.
        from ray_resume.checkpoint.rebinding import rebind
        from ray_resume.write.folder import folder_at

        return rebind(self._storage, folder_at(folder, filesystem))
