"""A checkpoint in a directory of one host.

Beside what both kinds of checkpoint keep (see `checkpoint.backend`), the directory has::

    <run id>.mdb    what that run committed (see `lmdb_file`)
    <run id>.lease  while that run is alive (see `lease`)
    lock            held for moments, to look at all leases at once

Knows neither Ray nor sources.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlparse

from typing_extensions import override

from ray_resume.checkpoint.backend import CheckpointBackend, LedgerBinding
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.contents import Contents
from ray_resume.checkpoint.local.lease import (
    Lease,
    exclusive_lock,
    first_rival,
    known_runs,
    live_runs,
)
from ray_resume.checkpoint.local.lmdb_file import (
    WriterContents,
    WriterFile,
    remove_half_made,
    write_whole,
    writer_files,
)
from ray_resume.checkpoint.local.objects import LocalObjects
from ray_resume.checkpoint.local.reader import Reading, read_writers
from ray_resume.checkpoint.mounts import network_filesystem_type
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint

__all__ = ["COMMIT_INTERVAL_S", "LocalBackend", "LocalLedgerBinding", "local_path"]

T = TypeVar("T")

COMMIT_INTERVAL_S = 0.2
"""How long a completed source waits for its commit at most, if the disk keeps up."""

_MAX_DEATH_DETECTION_S = 5.0


@dataclass(frozen=True)
class LocalLedgerBinding(LedgerBinding):
    """The directory, the lease and the id of a run, for its ledger's process."""

    directory: str
    lease: str
    run_id: str
    commit_interval_s: float = COMMIT_INTERVAL_S

    @property
    @override
    def _objects(self) -> LocalObjects:
        return LocalObjects(self.directory)

    @override
    def open(self, header: Mapping[str, Any]) -> tuple[Lease, WriterFile]:
        lease = Lease.join(Path(self.lease))
        try:
            return lease, WriterFile.create(Path(self.directory), self.run_id, header)
        except CheckpointError:
            lease.release()
            raise


class LocalBackend(CheckpointBackend):
    """A checkpoint in a directory on a local disk of this host."""

    layout = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        local = local_path(path)
        assert local is not None, f"{path} is no directory of this host"
        self.path = local
        # The files of dead runs as they were read last, and how they were then.
        self._dead: dict[str, tuple[_FileState, Reading]] = {}
        super().__init__(LocalObjects(str(local)))

    @property
    @override
    def max_death_detection_s(self) -> float:
        # The ledger of a killed driver outlives it by some seconds.
        return _MAX_DEATH_DETECTION_S

    @override
    def ensure(self) -> str:
        """Create the checkpoint if it is missing, and return its id: 8 hexadecimal digits.

        Raises:
            CheckpointError: the path is a file, cannot be written to, is on a network file system,
                or is of another format.
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
        return super().ensure()

    @override
    def identity(self) -> str:
        """Return the checkpoint's id."""
        self._refuse_remote()
        return super().identity()

    @override
    def acquire(self, owner: Owner, claim: Claim, *, wait_s: float) -> Lease:
        return Lease.acquire(self.path, owner, claim, wait_s=wait_s)

    @override
    def rival(self, claim: Claim) -> Owner | None:
        with exclusive_lock(self.path):
            return first_rival(self.path, claim)

    @override
    def bind_ledger(self, run_id: str, lease: Lease) -> LocalLedgerBinding:
        return LocalLedgerBinding(str(self.path), str(lease.path), run_id)

    @override
    def scan(self) -> Contents:
        self._refuse_remote()
        while True:
            listed = self.list_runs()
            readings = tuple(_readings(listed.files, listed.live))
            # A compaction may have merged some of these files into another in the meantime.
            if all(os.path.lexists(path) for path in listed.files.values()):
                return Contents(listed.live, listed.killed, listed.files, readings)

    @override
    def list_runs(self) -> Contents:
        with contextlib.ExitStack() as stack:
            # Without the right to write there, one may still look.
            with contextlib.suppress(CheckpointError):
                stack.enter_context(exclusive_lock(self.path))
            return Contents(*known_runs(self.path), self.writers())

    @override
    def read_runs(self, run_ids: Iterable[str], live: Collection[str]) -> Sequence[Reading]:
        wanted = set(run_ids)
        files = {run: path for run, path in self.writers().items() if run in wanted}
        return tuple(_readings(files, live))

    @override
    def writers(self) -> dict[str, Path | str]:
        return dict(writer_files(self.path))

    @override
    def write_whole(
        self, run_id: str, header: Mapping[str, Any], blocks: Iterable[bytes]
    ) -> Reading:
        path = write_whole(self.path, run_id, header, blocks)
        (reading,) = read_writers({run_id: (path, False)})
        return reading

    @override
    def remove_writers(self, files: Mapping[str, Path | str]) -> None:
        """Remove writers' files. A listing under the lock sees all of them or none."""
        with exclusive_lock(self.path):
            for path in files.values():
                failpoint("compact.removing")
                Path(path).unlink(missing_ok=True)

    @override
    def remove_half_made(self) -> None:
        remove_half_made(self.path)

    @override
    def _exclusively(
        self, who: str, act: Callable[[], T], *, undo: Callable[[], None] = lambda: None
    ) -> T:
        with exclusive_lock(self.path):
            return act()

    @override
    def _new_id(self) -> str:
        return secrets.token_hex(4)

    @override
    def _live_runs(self) -> dict[str, Owner]:
        return live_runs(self.path)

    @override
    def _read_dead_runs(self, own: str, own_contents: WriterContents | None) -> Contents:
        self._refuse_remote()
        with exclusive_lock(self.path):
            live = live_runs(self.path)
            live.pop(own, None)
            files = {run: path for run, path in self.writers().items() if run not in live}
        seen = {run: _FileState.of(path) for run, path in files.items()}
        from ray_resume.core.record_log import RecordLog

        # The files of dead runs do not change. Those that were read at the start of a run are not
        # read again at its end: it would take a process, and memory.
        found = {run: read for run, (state, read) in self._dead.items() if seen.get(run) == state}
        if own_contents is not None and own in files:
            header, blocks = own_contents
            found[own] = Reading(own, Path(files[own]), header, RecordLog(blocks))
        missing = {run: path for run, path in files.items() if run not in found}
        found |= {reading.run_id: reading for reading in _readings(missing, live)}
        self._dead = {
            run: (state, found[run])
            for run, state in seen.items()
            if state is not None and found[run].error is None and run != own
        }
        return Contents(live, {}, files, tuple(found[run] for run in files))

    def _refuse_remote(self) -> None:
        kind = network_filesystem_type(self.path)
        if kind is not None:
            raise CheckpointError(
                f"The checkpoint {self.path} is on a network file system ({kind}), where LMDB's "
                "memory map and the locks that keep runs apart cannot be trusted. Give a directory "
                "on a local disk of the driver's host (df -T shows the kinds); input and output "
                "may be anywhere."
            )


class _FileState(NamedTuple):
    """Tells a file from another in its place."""

    inode: int
    size: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path | str) -> _FileState | None:
        try:
            found = os.stat(path)
        except OSError:
            return None
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


def _readings(files: Mapping[str, Path | str], live: Container[str]) -> Iterator[Reading]:
    return read_writers({run_id: (Path(path), run_id in live) for run_id, path in files.items()})


def local_path(path: str | os.PathLike[str]) -> Path | None:
    """Return the directory of this host at ``path``, None if it is a URI of something else."""
    text = os.fspath(path)
    # One slash will do: pathlib folds two into one.
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        parsed = urlparse(text)
        if parsed.scheme != "file" or parsed.netloc not in ("", "localhost"):
            return None
        text = unquote(parsed.path)
    return Path(os.path.abspath(os.path.expanduser(text)))
