"""The checkpoint directory: what it is called, which sink it is bound to, whose files are in it.

::

    checkpoint.json     identity, format version, the sink that it is bound to
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
from typing import Any
from urllib.parse import unquote, urlparse

from ray_resume.errors import CheckpointError
from ray_resume.faults import reached
from ray_resume.lease import Owner, guard, live_runs
from ray_resume.reader import Reading, read_writers
from ray_resume.store import Union, fsync_directory, writer_files

__all__ = ["MERGED", "CheckpointDirectory", "Contents", "merged_headers", "new_run_id"]

MERGED = "merged"
"""In the header of a file that takes the place of others: their headers, by run id."""

_IDENTITY = "checkpoint.json"
_FORMAT_VERSION = 1


def new_run_id() -> str:
    """Draw a random run id: 12 hexadecimal digits."""
    return secrets.token_hex(6)


@dataclass(frozen=True)
class Contents:
    """A look at a checkpoint: the records that count, each run's header, and who is alive.

    A run's file may have been merged with others (see `compaction`): its header is here all the
    same. ``files`` are the writers' files that there are, by run id.
    """

    union: Union
    headers: dict[str, dict[str, Any]]
    live: dict[str, Owner]
    files: dict[str, Path]

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
            CheckpointError: the path is a file, cannot be written to, or is of a newer format.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise CheckpointError(
                f"The checkpoint {self.path} is a file, and a directory is needed. "
                "Give another path, or remove the file."
            ) from None
        except OSError as error:
            raise CheckpointError(f"The checkpoint {self.path} cannot be made: {error}.") from error
        if not (self.path / _IDENTITY).exists():
            with guard(self.path):
                if not (self.path / _IDENTITY).exists():
                    self._write_identity({"id": secrets.token_hex(4), "sink": None})
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
            self._write_identity({**identity, "sink": sink})

    def settled(self, own: str) -> Contents:
        """Read what all dead runs committed, and run ``own``, whose ledger is closed or not open.

        Who is dead is noted first, and what they committed is read then: a run that is alive at
        the note counts as alive, whatever it does meanwhile.

        Raises:
            CheckpointError: a file cannot be read; nothing is ever skipped over silently.
        """
        with guard(self.path):
            live = live_runs(self.path)
            live.pop(own, None)
            files = {run: path for run, path in writer_files(self.path).items() if run not in live}
        return _contents(_readings(files, live), live)

    def everything(self) -> Contents:
        """Read what dead and live runs committed up to now: good to look at.

        Works on a directory that cannot be written to as long as nobody is at work in it.
        """
        self._read_identity()
        readings, live = self.look()
        return _contents(readings, live)

    def look(self) -> tuple[list[Reading], dict[str, Owner]]:
        """Read every writer's file, and return what is in each of them, and who is alive."""
        while True:
            with contextlib.ExitStack() as stack:
                with contextlib.suppress(CheckpointError):
                    stack.enter_context(guard(self.path))
                live = live_runs(self.path)
                files = writer_files(self.path)
            readings = list(_readings(files, live))
            # Files that were merged in the meantime are elsewhere now.
            if all(os.path.lexists(path) for path in files.values()):
                return readings, live

    def _read_identity(self) -> dict[str, Any]:
        path = self.path / _IDENTITY
        try:
            identity = json.loads(path.read_bytes())
            version = identity["format"]
            identity["id"], identity["sink"]
        except FileNotFoundError:
            raise CheckpointError(
                f"There is no checkpoint at {self.path}. Is the path right? A checkpoint is made "
                "by the first resumable_read that names it."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"The checkpoint file {path} cannot be read: {error}. Restore it from a copy, or "
                "start over with an empty checkpoint and an empty output folder."
            ) from error
        if version != _FORMAT_VERSION:
            raise CheckpointError(
                f"The checkpoint {self.path} has format {version}, and this ray_resume reads "
                f"format {_FORMAT_VERSION}. Upgrade ray_resume, and run again."
            )
        return dict(identity)

    def _write_identity(self, identity: dict[str, Any]) -> None:
        path = self.path / _IDENTITY
        nascent = self.path / f".{_IDENTITY}.new"
        try:
            with nascent.open("w") as file:
                json.dump({**identity, "format": _FORMAT_VERSION}, file)
                file.flush()
                os.fsync(file.fileno())
            reached("checkpoint.writing")
            os.replace(nascent, path)
            fsync_directory(self.path)
        except OSError as error:
            raise CheckpointError(
                f"The checkpoint file {path} cannot be written: {error}."
            ) from error


def _readings(files: dict[str, Path], live: Container[str]) -> Iterator[Reading]:
    return read_writers({run_id: (path, run_id in live) for run_id, path in files.items()})


def _contents(readings: Iterable[Reading], live: dict[str, Owner]) -> Contents:
    headers: dict[str, dict[str, Any]] = {}
    pairs, files = {}, {}
    for reading in readings:
        if reading.error is not None:
            raise reading.error
        headers.update(merged_headers(reading.header))
        headers[reading.run_id] = dict(reading.header)
        pairs[reading.run_id], files[reading.run_id] = reading.pairs, reading.path

    def owner(value: bytes) -> str:
        # Only a damaged record is looked for, so that the others need not say whose they are.
        for reading in _readings(files, live):
            if any(value == other for _, other in reading.pairs):
                return f"the checkpoint file {reading.path}"
        return "a checkpoint file"

    return Contents(Union(pairs, owner=owner), headers, live, files)


def merged_headers(header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the headers of the runs whose files were merged into the one with ``header``."""
    merged = header.get(MERGED, {})
    if not isinstance(merged, dict) or not all(isinstance(of, dict) for of in merged.values()):
        raise CheckpointError(
            f"The header of the checkpoint file of run {header.get('run_id')} is damaged. Restore "
            "the file from a copy, or start over with an empty checkpoint and an empty output "
            "folder."
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
