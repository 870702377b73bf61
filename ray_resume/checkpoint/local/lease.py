"""Leases: which runs are alive.

A run's lease is the file ``<run id>.lease`` in the checkpoint directory. Each process of the run
has a shared flock on it for as long as it lives: the driver takes it, the ledger's process joins.
The kernel drops a dead process's lock, so there is nothing to time out on one host, and a
stopped process keeps it. A process takes or inspects leases under one exclusive lock on the file
``lock``. To look at all leases and to take a new one is then a single step.

A run is dead when its lease is not locked, or the file is gone. A child that C code forked from a
process of the run still holds the lock when that process was killed. (Other children close it, see
`file_lock`.) So a lease also names its holders. If the kernel knows all of them to be dead, the run
is dead, even if a child holds the lock. If a holder is not named, or is in a container that this
process cannot see, the lock decides.

::

    {"run_id": ...}     the owner, for messages to people
    <boot> <ns> <pid>   the driver's process, padded (see `process`)
    <boot> <ns> <pid>   the ledger's process; blank until it joins
    {"shard": ...}      the claim (see `claims`)
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from ray_resume.checkpoint.claims import Claim, Owner, in_use_error, warn_waiting
from ray_resume.checkpoint.local.file_lock import FileLock
from ray_resume.checkpoint.local.process import UNKNOWN, is_dead, this_process
from ray_resume.core.filenames import is_usual_run
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint

__all__ = ["Lease", "exclusive_lock", "first_rival", "known_runs", "live_runs"]

_SUFFIX = ".lease"
_LOCK_FILE = "lock"
_POLL_INTERVAL_S = 0.1
# A process holds the exclusive lock for moments, on a slow disk for seconds.
_LOCK_WAIT_S = 60.0
_HOLDERS = 2
_HOLDER_BYTES = 96
_HEAD_BYTES = 1 << 14


class Lease:
    """A held lease. Take one with :meth:`acquire`; a second process of the run joins it."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def acquire(cls, directory: Path, owner: Owner, claim: Claim, *, wait_s: float) -> Lease:
        """Take the lease of run ``owner.run_id`` as soon as no live run shares a source with it.

        Raises:
            CheckpointError: a live run still does after ``wait_s`` seconds; the message names its
                owner.
        """
        deadline = time.monotonic() + wait_s
        path = directory / f"{owner.run_id}{_SUFFIX}"
        awaited = None
        while True:
            with exclusive_lock(directory):
                rival = first_rival(directory, claim)
                if rival is None:
                    return cls._create(path, owner, claim)
            if time.monotonic() >= deadline:
                raise in_use_error(str(directory), owner, rival, wait_s)
            if rival != awaited:
                warn_waiting(str(directory), owner, rival, wait_s)
                awaited = rival
            time.sleep(_POLL_INTERVAL_S)

    @classmethod
    def hold_unclaimed(cls, directory: Path, owner: Owner) -> Lease:
        """Hold a lease that claims no source, so that it never waits; leave dead runs' leases."""
        with exclusive_lock(directory):
            return cls._create(directory / f"{owner.run_id}{_SUFFIX}", owner, Claim(frozenset()))

    @classmethod
    def _create(cls, path: Path, owner: Owner, claim: Claim) -> Lease:
        try:
            lock = FileLock(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except OSError as error:
            raise CheckpointError(f"The lease {path} cannot be written: {error}.") from error
        try:
            if not lock.lock(shared=True, wait_s=_LOCK_WAIT_S):
                raise OSError("another process keeps it locked")
            failpoint("lease.created")
            with os.fdopen(os.dup(lock.fileno()), "wb") as file:
                file.write(json.dumps(asdict(owner)).encode() + b"\n")
                file.writelines(_holder_lines(this_process()))
                file.write(claim.to_bytes())
        except OSError as error:
            lock.close()
            path.unlink(missing_ok=True)
            raise CheckpointError(f"The lease {path} cannot be written: {error}.") from error
        return cls(path, lock)

    @staticmethod
    def is_orphaned(path: Path) -> bool:
        """Return whether there is a lease at ``path`` that no process of this host holds."""
        with contextlib.suppress(CheckpointError), exclusive_lock(path.parent):
            return path.exists() and not _is_held(path)
        return False

    @classmethod
    def join(cls, path: Path) -> Lease:
        """Hold the lease at ``path`` in this process too.

        Raises:
            CheckpointError: the lease is gone, because the run that took it has ended.
        """
        with exclusive_lock(path.parent):
            # Another run may have skipped a lease that no process holds: a dead run stays dead.
            if not _is_held(path):
                raise CheckpointError(f"The lease {path} is gone: its run has ended.")
            lock = FileLock(path, os.O_RDWR)
            try:
                if not lock.lock(shared=True, wait_s=_LOCK_WAIT_S):
                    raise OSError("another process keeps it locked")
                _add_holder(lock)
            except OSError as error:
                lock.close()
                raise CheckpointError(f"The lease {path} cannot be joined: {error}.") from error
        lease = cls(path, lock)
        lease.check()
        return lease

    def check(self) -> None:
        """Make sure that the lease is still held.

        Raises:
            CheckpointError: the lease was released, or its file was removed or replaced.
        """
        with contextlib.suppress(OSError):
            if self._lock.is_open and os.path.samestat(
                os.fstat(self._lock.fileno()), os.stat(self.path)
            ):
                return
        raise CheckpointError(
            f"The lease {self.path} is lost: its file was removed or replaced, and another run may "
            "have started. This run commits nothing more; run again to go on."
        )

    def release(self) -> None:
        """Release the lease in this process; the run is dead once no process of it holds it."""
        self._lock.close()

    def is_last_holder(self, *, wait_s: float) -> bool:
        """Return whether no other process of this run holds the lease, after ``wait_s`` at most.

        While one does, it may still commit.
        """
        deadline = time.monotonic() + wait_s
        while self._lock.is_open:
            # To turn a shared lock into an exclusive one can release it for a moment. No other
            # process looks at it then, because this one has the exclusive lock.
            with exclusive_lock(self.path.parent):
                try:
                    if self._lock.lock() or self._others_are_dead():
                        return True
                finally:
                    if not self._lock.lock(shared=True, wait_s=_LOCK_WAIT_S):
                        self.release()
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL_INTERVAL_S)
        return False

    def _others_are_dead(self) -> bool:
        others = [holder for holder in _holders(self._lock) if holder != this_process()]
        return bool(others) and all(map(is_dead, others))

    def end(self, *, wait_s: float) -> None:
        """Release the lease and remove its file: the run is over.

        If another process of the run still holds it after ``wait_s``, the file stays, and the run
        is alive for as long as that process is.
        """
        with contextlib.suppress(CheckpointError):
            if self.is_last_holder(wait_s=wait_s):
                with contextlib.suppress(CheckpointError):
                    self.check()
                    failpoint("lease.ending")
                    self.path.unlink()
        self.release()


def live_runs(directory: Path) -> dict[str, Owner]:
    """Return the runs whose lease is held; under :func:`exclusive_lock` this can be relied on."""
    return known_runs(directory)[0]


def known_runs(directory: Path) -> tuple[dict[str, Owner], dict[str, Owner]]:
    """Return the live runs, and those that ended without removing their lease: killed, it seems.

    Call it under :func:`exclusive_lock`. To inspect a lease that no process holds is to hold it for
    a moment, and another process would take its run for a live one.
    """
    live: dict[str, Owner] = {}
    killed: dict[str, Owner] = {}
    for path in _lease_files(directory):
        held = _is_held(path)
        # A run whose lease is gone by now has ended as it should.
        if held or path.exists():
            (live if held else killed)[path.name.removesuffix(_SUFFIX)] = _read_owner(path)
    return live, killed


@contextlib.contextmanager
def exclusive_lock(directory: Path) -> Iterator[None]:
    """Hold the checkpoint's exclusive lock, for moments only: nothing slow belongs under it.

    Raises:
        CheckpointError: the directory cannot be written to.
    """
    path = directory / _LOCK_FILE
    try:
        try:
            lock = FileLock(path, os.O_RDWR | os.O_CREAT)
        except PermissionError:
            # A process that may only read can still keep out of the others' way.
            lock = FileLock(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {directory} cannot be locked: {error}. It must be a directory that "
            "this process may write to."
        ) from error
    try:
        if not lock.lock(wait_s=_LOCK_WAIT_S):
            raise CheckpointError(
                f"The checkpoint {directory} is locked: another process has held {path} for more "
                f"than {_LOCK_WAIT_S:g} s. Its holder was stopped, or is the child of a process "
                f"that was killed. Find it (fuser -v {path}), end it, and run again."
            )
        yield
    finally:
        lock.close()


def _lease_files(directory: Path) -> list[Path]:
    """List the leases in ``directory``, without files of others that are named like leases."""
    return [
        path
        for path in sorted(directory.glob(f"*{_SUFFIX}"))
        # The name of a run's lease identifies the run, even if nothing is written into it yet.
        if is_usual_run(path.stem) or _read_owner(path).pid
    ]


def first_rival(directory: Path, claim: Claim) -> Owner | None:
    """Return the owner of a live run that shares a source with ``claim``; remove dead leases.

    Call this under :func:`exclusive_lock`.
    """
    for path in _lease_files(directory):
        if not _is_held(path):
            # Its run was killed. The run's writer file has its records; the lease adds nothing.
            path.unlink(missing_ok=True)
            continue
        # The run may end, and remove its lease, while this process reads it.
        with contextlib.suppress(FileNotFoundError):
            if claim.overlaps(_read_claim(path)):
                return _read_owner(path)
    return None


def _is_held(path: Path) -> bool:
    try:
        lock = FileLock(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        if lock.lock():
            return False
        holders = _holders(lock)
        return not holders or not all(map(is_dead, holders))
    finally:
        lock.close()


def _holder_lines(*holders: str) -> list[bytes]:
    # The length is fixed, so that a holder that joins writes its line in place.
    lines = [*holders, *[""] * (_HOLDERS - len(holders))]
    fit = (line if len(line) <= _HOLDER_BYTES else UNKNOWN for line in lines)
    return [line.ljust(_HOLDER_BYTES).encode() + b"\n" for line in fit]


def _holders(lock: FileLock) -> list[str]:
    """Return the processes that hold a lease; none if the lease does not name them."""
    lines = os.pread(lock.fileno(), _HEAD_BYTES, 0).split(b"\n", _HOLDERS + 1)[1:-1]
    if [len(line) for line in lines] != [_HOLDER_BYTES] * _HOLDERS or not lines[0].strip():
        return []
    return [line.decode(errors="replace").strip() for line in lines if line.strip()]


def _add_holder(lock: FileLock) -> None:
    """Name this process among the holders of a lease."""
    holders = _holders(lock)
    if not holders:
        return
    # If there are more holders than lines, the last line says that not all are known.
    known = [*holders, this_process()] if len(holders) < _HOLDERS else [holders[0], UNKNOWN]
    owner = os.pread(lock.fileno(), _HEAD_BYTES, 0).partition(b"\n")[0]
    os.pwrite(lock.fileno(), b"".join(_holder_lines(*known)), len(owner) + 1)


def _read_owner(path: Path) -> Owner:
    try:
        with path.open("rb") as file:
            return Owner.of(json.loads(file.readline()))
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    # It is being written, or was when its run was killed. Only its name is known then.
    return Owner(path.name.removesuffix(_SUFFIX), "unknown", 0, time.time())


def _read_claim(path: Path) -> Claim:
    parts = path.read_bytes().split(b"\n", _HOLDERS + 1)
    try:
        return Claim.from_bytes(parts[-1])
    except CheckpointError:
        # It is being written, or was damaged: its run may have claimed every source.

        return Claim(None)
