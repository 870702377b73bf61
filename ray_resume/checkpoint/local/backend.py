"""The checkpoint directory: what it is called, which sink it is bound to, whose files are in it.

::

    checkpoint.json     identity, format version, the sink that it is bound to
    arrays.json         which rank each task of an array has drawn (see `core.shards`), if any has
    <run id>.mdb        what that run committed (see `lmdb_file`)
    <run id>.lease      while that run is alive (see `lease`)
    schemas/<run>.json  which types the output has (see `output_schemas`), if that run changed them
    lock                held for moments, to look at all leases at once

Knows neither Ray nor sources. Invariant: what is read to skip by comes from dead runs alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.contents import Contents, Look, Note, contents_of
from ray_resume.checkpoint.dead_letters import LetterFolder
from ray_resume.checkpoint.local.lease import Lease, guard, known_runs, live_runs
from ray_resume.checkpoint.local.lmdb_file import (
    WriterFile,
    remove_half_made,
    write_whole,
    writer_files,
)
from ray_resume.checkpoint.local.reader import Reading, read_writers
from ray_resume.checkpoint.mounts import network_filesystem_type
from ray_resume.checkpoint.output_schemas import SchemaStore
from ray_resume.checkpoint.shared.objects import StoredObjects
from ray_resume.core.shards import ArrayTask
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint
from ray_resume.files import fsync_directory, write_atomically

__all__ = [
    "COMMIT_INTERVAL_S",
    "LocalBackend",
    "LocalLedgerBinding",
    "local_path",
    "new_run_id",
]

COMMIT_INTERVAL_S = 0.2
"""The longest that a completed source waits to be committed, disk permitting."""

_MAX_DEATH_DETECTION_S = 5.0

_IDENTITY = "checkpoint.json"
_ARRAYS = "arrays.json"
_FORMAT_VERSION = 1


def new_run_id() -> str:
    """Draw a random run id: 12 hexadecimal digits."""
    return secrets.token_hex(6)


@dataclass(frozen=True)
class LocalLedgerBinding:
    """Where a run's ledger finds its lease and makes its writer's file; picklable."""

    directory: str
    lease: str
    run_id: str
    commit_interval_s: float = COMMIT_INTERVAL_S

    def open(self, header: Mapping[str, Any]) -> tuple[Lease, WriterFile]:
        """Join the run's lease, and make its file; called once, by the ledger's process.

        Raises:
            CheckpointError: the lease is gone, or the file cannot be made.
        """
        lease = Lease.join(Path(self.lease))
        try:
            return lease, WriterFile.create(Path(self.directory), self.run_id, header)
        except CheckpointError:
            lease.release()
            raise

    def letters(self) -> LetterFolder:
        """Return where dead letters go."""
        return LetterFolder(Path(self.directory))

    def schemas(self) -> SchemaStore:
        """Return where the output's schema is kept."""
        return _schemas(self.directory)


class LocalBackend:
    """A checkpoint directory on this host's file system. Creating the object touches nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        local = local_path(path)
        assert local is not None, f"{path} is no directory of this host"
        self.path = local

    def ensure(self) -> str:
        """Create the checkpoint if it is missing, and return its id: 8 hexadecimal digits.

        Raises:
            CheckpointError: the path is a file, cannot be written to, is on a network file system,
                or is of a newer format.
        """
        self._refuse_remote()  # Before anything is made there.
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise CheckpointError(
                f"The checkpoint {self.path} is a file, and a directory is needed. "
                "Give another path, or remove the file."
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"The checkpoint {self.path} cannot be made: {error}. Give a path below a "
                "directory that this process may write to, on a disk with space."
            ) from error
        if not (self.path / _IDENTITY).exists():
            with guard(self.path):
                if not (self.path / _IDENTITY).exists():
                    self._write_json(_IDENTITY, {"id": secrets.token_hex(4), "sink": None})
        return self.identity()

    def identity(self) -> str:
        """Return the checkpoint's id.

        Raises:
            CheckpointError: there is no checkpoint here.
        """
        return str(self._read_identity()["id"])

    def sink(self) -> str | None:
        """Return the URI or path of the sink that the checkpoint is bound to, if it is."""
        sink = self._read_identity()["sink"]
        return None if sink is None else str(sink)

    def bind(self, sink: str, own: str) -> None:
        """Bind the checkpoint to ``sink``, in place of what it was bound to. Call under a lease.

        Raises:
            CheckpointError: it is bound to another one, and a run other than ``own`` is alive.
        """
        with guard(self.path):
            identity = self._read_identity()
            if identity["sink"] == sink:
                return
            if identity["sink"] is not None and live_runs(self.path).keys() - {own}:
                raise CheckpointError(
                    f"The checkpoint {self.path} is being used for {identity['sink']} by another "
                    f"run, and this one would write to {sink}. Give it a checkpoint of its own."
                )
            self._write_json(_IDENTITY, {**identity, "sink": sink})

    @property
    def uri(self) -> str:
        """The path, as a user would write it."""
        return str(self.path)

    @property
    def root(self) -> str:
        """The path, as the file system of an output folder would spell it."""
        return str(self.path)

    @property
    def max_death_detection_s(self) -> float:
        """For how long a run that was killed may seem to be at work: its ledger outlives it."""
        return _MAX_DEATH_DETECTION_S

    def acquire(self, owner: Owner, claim: Claim, *, wait_s: float) -> Lease:
        """Take the lease of run ``owner.run_id``; see :meth:`Lease.acquire`."""
        return Lease.acquire(self.path, owner, claim, wait_s=wait_s)

    def bind_ledger(self, run_id: str, lease: Lease) -> LocalLedgerBinding:
        """Return what the ledger's process of the run needs."""
        return LocalLedgerBinding(str(self.path), str(lease.path), run_id)

    def schemas(self) -> SchemaStore:
        """Return where the output's schema is kept."""
        return _schemas(str(self.path))

    def letters(self) -> LetterFolder:
        """Return where dead letters are."""
        return LetterFolder(self.path)

    def writers(self) -> dict[str, Path | str]:
        """List the writers' files by run id."""
        return dict(writer_files(self.path))

    def write_whole(
        self, run_id: str, header: Mapping[str, Any], blocks: Iterable[bytes]
    ) -> Reading:
        """Make a writer's file that is whole and durable, and read it back."""
        path = write_whole(self.path, run_id, header, blocks)
        (reading,) = read_writers({run_id: (path, False)})
        return reading

    def remove_writers(self, files: Mapping[str, Path | str]) -> None:
        """Remove writers' files; whoever lists them sees all of them or none."""
        with guard(self.path):
            for path in files.values():
                failpoint("compact.removing")
                Path(path).unlink(missing_ok=True)

    def remove_half_made(self) -> None:
        """Remove what killed processes left half made. Call it under a lease on everything."""
        remove_half_made(self.path)

    def rank_of(self, task: ArrayTask) -> int:
        """Return the rank of ``task`` among those of its array, drawn when it first asks.

        Guarantees: tasks with different indexes get different ranks, from 0 to ``count - 1``; one
        with the same index gets the same rank again. It was durable before this returns.

        Raises:
            CheckpointError: more tasks than ``task.count`` ask, or the notes cannot be read or
                written.
        """
        with guard(self.path):
            arrays = self._read_arrays()
            drawn = arrays.setdefault(task.array, [])
            if task.index not in drawn:
                if len(drawn) >= task.count:
                    raise CheckpointError(
                        f"The array ({task.array}) has drawn all its ranks, for the tasks "
                        f"{', '.join(map(str, drawn))}, and task {task.index} is one more. Is the "
                        "count right? If the array is another one with the same id, pass "
                        "shard=(index, count) instead."
                    )
                drawn.append(task.index)
                self._write_json(_ARRAYS, {"arrays": arrays})
            return drawn.index(task.index)

    def _read_arrays(self) -> dict[str, list[int]]:
        path = self.path / _ARRAYS
        try:
            content = json.loads(path.read_bytes())
            version, arrays = content["format"], content["arrays"]
            if version == _FORMAT_VERSION and not all(
                type(index) is int for drawn in arrays.values() for index in drawn
            ):
                raise TypeError("a task's index is no number")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"The checkpoint file {path} cannot be read: {error}. It only says which share "
                "each task of an array with gaps has. Remove it when no such array is at work or "
                "in the queue; what is done stays done."
            ) from error
        if version != _FORMAT_VERSION:
            raise self._of_another_format(version)
        return {str(array): list(drawn) for array, drawn in arrays.items()}

    def committed_by_dead_runs(self, own: str) -> Contents:
        """Read what all dead runs committed, and run ``own``, whose ledger is closed or not open.

        Who is dead is noted first, and what they committed is read then: a run that is alive at
        the note counts as alive, whatever it does meanwhile.

        Raises:
            CheckpointError: a file cannot be read; nothing is ever skipped over silently.
        """
        self._refuse_remote()
        with guard(self.path):
            live = live_runs(self.path)
            live.pop(own, None)
            files: dict[str, Path | str] = {
                run: path for run, path in writer_files(self.path).items() if run not in live
            }
        return contents_of(_readings(files, live), live, {})

    def snapshot(self) -> Contents:
        """Read what dead and live runs committed up to now: good to look at.

        Works on a directory that cannot be written to as long as nobody is at work in it.
        """
        self._read_identity()
        look = self.scan()
        return contents_of(look.readings, look.live, look.killed)

    def scan(self) -> Look:
        """Read every writer's file, damaged or not, and say who is about."""
        self._refuse_remote()
        while True:
            note = self.list_runs()
            readings = list(_readings(note.files, note.live))
            # Files that were merged in the meantime are elsewhere now.
            if all(os.path.lexists(path) for path in note.files.values()):
                return Look(note.live, note.killed, note.files, readings)

    def list_runs(self) -> Note:
        """Note who is about and which files there are, all at one moment."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(CheckpointError):
                stack.enter_context(guard(self.path))
            return Note(*known_runs(self.path), dict(writer_files(self.path)))

    def _refuse_remote(self) -> None:
        fstype = network_filesystem_type(self.path)
        if fstype is not None:
            raise CheckpointError(
                f"The checkpoint {self.path} is on a network file system ({fstype}), where LMDB's "
                "memory map and the locks that keep runs apart cannot be trusted. Give a directory "
                "on a local disk of the driver's host (df -T shows the kinds); input and output "
                "may be anywhere."
            )

    def _read_identity(self) -> dict[str, Any]:
        self._refuse_remote()
        path = self.path / _IDENTITY
        try:
            identity = json.loads(path.read_bytes())
            version = identity["format"]
            # It is in the names of output files, so it must not lead elsewhere.
            if re.fullmatch("[0-9a-f]{8}", identity["id"]) is None:
                raise ValueError(f"its id is {identity['id']!r}")
            if not isinstance(identity["sink"], str | None):
                raise TypeError(f"its sink is {identity['sink']!r}")
        except FileNotFoundError:
            raise CheckpointError(
                f"There is no checkpoint at {self.path}. Is the path right? A checkpoint is made "
                "by the first resumable_read that names it."
            ) from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"The checkpoint file {path} cannot be read: {error}. Restore it from a copy, or "
                "start over with an empty checkpoint and an empty output folder."
            ) from error
        if version != _FORMAT_VERSION:
            raise self._of_another_format(version)
        return dict(identity)

    def _of_another_format(self, version: Any) -> CheckpointError:
        return CheckpointError(
            f"The checkpoint {self.path} has format {version}, and this ray_resume reads "
            f"format {_FORMAT_VERSION}. Upgrade ray_resume, and run again."
        )

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a file of ours, or replace it; whole and durable. Call it under the guard."""
        path = self.path / name
        data = json.dumps({**content, "format": _FORMAT_VERSION}).encode()
        try:
            write_atomically(path, data, before_rename=lambda: failpoint("checkpoint.writing"))
            fsync_directory(self.path)
        except OSError as error:
            raise CheckpointError(
                f"The checkpoint file {path} cannot be written: {error}. See that the directory "
                "is writable and has space, and run again."
            ) from error


def _schemas(directory: str) -> SchemaStore:
    # Looking at a checkpoint must not load pyarrow.
    from pyarrow.fs import LocalFileSystem

    return SchemaStore(StoredObjects(LocalFileSystem(), directory, directory), directory)


def _readings(files: Mapping[str, Path | str], live: Container[str]) -> Iterator[Reading]:
    return read_writers({run_id: (Path(path), run_id in live) for run_id, path in files.items()})


def local_path(path: str | os.PathLike[str]) -> Path | None:
    """Return the directory of this host that is meant, None if it is a URI of something else."""
    text = os.fspath(path)
    # One slash will do: pathlib folds two into one.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        parsed = urlparse(text)
        if parsed.scheme != "file" or parsed.netloc not in ("", "localhost"):
            return None
        text = unquote(parsed.path)
    return Path(os.path.abspath(os.path.expanduser(text)))
