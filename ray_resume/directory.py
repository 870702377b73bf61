"""The checkpoint directory: what it is called, which sink it is bound to, whose files are in it.

::

    checkpoint.json     identity, format version, the sink that it is bound to
    arrays.json         which rank each task of an array has drawn (see `shard`), if any has
    <run id>.mdb        what that run committed (see `store`)
    <run id>.lease      while that run is alive (see `lease`)
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
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from ray_resume.errors import CheckpointError
from ray_resume.faults import reached
from ray_resume.lease import Owner, guard, known_runs, live_runs
from ray_resume.mounts import remote_fstype
from ray_resume.reader import Reading, read_writers
from ray_resume.shard import ArrayTask
from ray_resume.store import fsync_directory, writer_files

if TYPE_CHECKING:
    from ray_resume.union import Union

__all__ = [
    "MERGED",
    "CheckpointDirectory",
    "Contents",
    "Look",
    "Note",
    "merged_headers",
    "new_run_id",
]

MERGED = "merged"
"""In the header of a file that takes the place of others: their headers, by run id."""

_IDENTITY = "checkpoint.json"
_ARRAYS = "arrays.json"
_FORMAT_VERSION = 1


def new_run_id() -> str:
    """Draw a random run id: 12 hexadecimal digits."""
    return secrets.token_hex(6)


@dataclass(frozen=True)
class Note:
    """A checkpoint at one moment: who is at work, who was killed, and the writers' files."""

    live: dict[str, Owner]
    killed: dict[str, Owner]
    files: dict[str, Path]


@dataclass(frozen=True)
class Look(Note):
    """What the files that were noted held."""

    readings: list[Reading]


@dataclass(frozen=True)
class Contents:
    """A look at a checkpoint: the records that count, each run's header, and who is alive.

    A run's file may have been merged with others (see `compaction`): its header is here all the
    same. ``files`` are the writers' files that there are, by run id. ``killed`` are the runs that
    left a lease behind, for messages alone.
    """

    union: Union
    headers: dict[str, dict[str, Any]]
    live: dict[str, Owner]
    files: dict[str, Path]
    killed: dict[str, Owner]

    @property
    def dead_runs(self) -> frozenset[str]:
        """The runs that are on record and over: their left-overs may be removed."""
        return frozenset(self.headers) - frozenset(self.live)


class CheckpointDirectory:
    """A checkpoint directory on this host's file system. Creating the object touches nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _local_path(path)

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

    def settled(self, own: str) -> Contents:
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
            files = {run: path for run, path in writer_files(self.path).items() if run not in live}
        return _contents(_readings(files, live), live, {})

    def everything(self) -> Contents:
        """Read what dead and live runs committed up to now: good to look at.

        Works on a directory that cannot be written to as long as nobody is at work in it.
        """
        self._read_identity()
        look = self.look()
        return _contents(look.readings, look.live, look.killed)

    def look(self) -> Look:
        """Read every writer's file, damaged or not, and say who is about."""
        self._refuse_remote()
        while True:
            note = self.note()
            readings = list(_readings(note.files, note.live))
            # Files that were merged in the meantime are elsewhere now.
            if all(os.path.lexists(path) for path in note.files.values()):
                return Look(note.live, note.killed, note.files, readings)

    def note(self) -> Note:
        """Note who is about and which files there are, all at one moment."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(CheckpointError):
                stack.enter_context(guard(self.path))
            return Note(*known_runs(self.path), writer_files(self.path))

    def _refuse_remote(self) -> None:
        fstype = remote_fstype(self.path)
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
        nascent = self.path / f".{name}.new"
        try:
            with nascent.open("w") as file:
                json.dump({**content, "format": _FORMAT_VERSION}, file)
                file.flush()
                os.fsync(file.fileno())
            reached("checkpoint.writing")
            os.replace(nascent, path)
            fsync_directory(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                nascent.unlink(missing_ok=True)
            raise CheckpointError(
                f"The checkpoint file {path} cannot be written: {error}. See that the directory "
                "is writable and has space, and run again."
            ) from error


def _readings(files: dict[str, Path], live: Container[str]) -> Iterator[Reading]:
    return read_writers({run_id: (path, run_id in live) for run_id, path in files.items()})


def _contents(
    readings: Iterable[Reading], live: dict[str, Owner], killed: dict[str, Owner]
) -> Contents:
    headers: dict[str, dict[str, Any]] = {}
    pairs, files = {}, {}
    for reading in readings:
        if reading.error is not None:
            raise reading.error
        headers.update(merged_headers(reading.path, reading.header))
        headers[reading.run_id] = dict(reading.header)
        pairs[reading.run_id], files[reading.run_id] = reading.pairs, reading.path

    def owner(run_id: str) -> str:
        return f"the checkpoint file {files[run_id]}"

    # Not before the files are read: a process that reads nothing need not load numpy.
    from ray_resume.union import Union

    return Contents(Union(pairs, owner=owner), headers, live, files, killed)


def merged_headers(path: Path, header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the headers of the runs whose files were merged into ``path``, with ``header``.

    Raises:
        CheckpointError: it is damaged.
    """
    merged = header.get(MERGED, {})
    if not isinstance(merged, dict) or not all(isinstance(of, dict) for of in merged.values()):
        raise CheckpointError(
            f"The header of the checkpoint file {path} is damaged. Restore the file from a copy, "
            "or start over with an empty checkpoint and an empty output folder."
        )
    return merged


def _local_path(path: str | os.PathLike[str]) -> Path:
    text = os.fspath(path)
    # One slash will do: pathlib folds two into one.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        parsed = urlparse(text)
        if parsed.scheme != "file" or parsed.netloc not in ("", "localhost"):
            raise CheckpointError(
                f"The checkpoint {text} is not on a local file system, and this version keeps "
                "checkpoints on local file systems only. Give a path on the driver's host; the "
                "input may be anywhere."
            )
        text = unquote(parsed.path)
    return Path(os.path.abspath(os.path.expanduser(text)))
