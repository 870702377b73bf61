"""Leases: which runs are alive.

A run's lease is the file ``<run id>.lease`` in the checkpoint directory, with a shared flock on it
for as long as a process of the run lives: its driver takes it, the ledger's process joins it.
The kernel drops a dead process's lock, so there is nothing to time out on one host, and a
stopped process keeps it. Leases are taken and inspected under one exclusive lock on ``lock``, so
that a look at all leases and the taking of a new one are one step.

A run is dead when nobody holds a lock on its lease, or the file is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from ray_resume.checkpoint.claims import Claim, Owner, in_use_error
from ray_resume.core.filenames import is_usual_run
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import failpoint

__all__ = ["Lease", "guard", "known_runs", "live_runs"]

_SUFFIX = ".lease"
_GUARD = "lock"
_POLL_INTERVAL_S = 0.1


class Lease:
    """A held lease. Take one with :meth:`acquire`; a second process of the run joins it."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor

    @classmethod
    def acquire(cls, directory: Path, owner: Owner, claim: Claim, *, wait_s: float) -> Lease:
        """Take the lease of run ``owner.run_id`` as soon as no live run shares a source with it.

        Raises:
            CheckpointError: after ``wait_s`` seconds one still does; the message names its owner.
        """
        deadline = time.monotonic() + wait_s
        path = directory / f"{owner.run_id}{_SUFFIX}"
        while True:
            with guard(directory):
                rival = _first_rival(directory, claim)
                if rival is None:
                    return cls._create(path, owner, claim)
            if time.monotonic() >= deadline:
                raise in_use_error(str(directory), owner, rival, wait_s)
            time.sleep(_POLL_INTERVAL_S)

    @classmethod
    def hold(cls, directory: Path, owner: Owner) -> Lease:
        """Hold a lease that claims nothing, whoever else does; those of the dead stay there."""
        with guard(directory):
            return cls._create(directory / f"{owner.run_id}{_SUFFIX}", owner, Claim(frozenset()))

    @classmethod
    def _create(cls, path: Path, owner: Owner, claim: Claim) -> Lease:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CheckpointError(f"The lease {path} cannot be written: {error}.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            failpoint("lease.created")
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(json.dumps(asdict(owner)).encode() + b"\n")
                file.write(claim.to_bytes())
        except OSError as error:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise CheckpointError(f"The lease {path} cannot be written: {error}.") from error
        return cls(path, descriptor)

    @staticmethod
    def is_abandoned(path: Path) -> bool:
        """Say whether there is a lease at ``path`` that no process of this host holds."""
        with contextlib.suppress(CheckpointError), guard(path.parent):
            return path.exists() and not _is_held(path)
        return False

    @classmethod
    def join(cls, path: Path) -> Lease:
        """Hold the lease at ``path`` in this process too.

        Raises:
            CheckpointError: it is gone: the run that took it has ended.
        """
        with guard(path.parent):
            # A lease that nobody holds may have been passed over already: a dead run stays dead.
            if not _is_held(path):
                raise CheckpointError(f"The lease {path} is gone: its run has ended.")
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        lease = cls(path, descriptor)
        lease.check()
        return lease

    def check(self) -> None:
        """Make sure that the lease is still held.

        Raises:
            CheckpointError: it was released, or its file was removed or replaced.
        """
        with contextlib.suppress(OSError):
            if self._descriptor is not None and os.path.samestat(
                os.fstat(self._descriptor), os.stat(self.path)
            ):
                return
        raise CheckpointError(
            f"The lease {self.path} is lost: somebody removed it, and another run may have "
            "started. This run commits nothing more; run again to go on."
        )

    def release(self) -> None:
        """Let go in this process; the run is dead once none of its processes holds the lease."""
        if self._descriptor is not None:
            # Unlocked by name, since a forked child may still hold the same open file.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None

    def alone(self, *, wait_s: float) -> bool:
        """Say whether no other process of this run holds the lease, after ``wait_s`` at most.

        While one does, it may still commit.
        """
        if self._descriptor is None:
            return False
        deadline = time.monotonic() + wait_s
        while True:
            # Turning a shared lock into an exclusive one can let go of it for a moment; under the
            # guard nobody looks.
            with guard(self.path.parent):
                try:
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                except BlockingIOError:
                    pass
                finally:
                    fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_INTERVAL_S)

    def end(self, *, wait_s: float) -> None:
        """Release the lease and remove its file: the run is over.

        If another process of the run still holds it after ``wait_s``, the file stays, and the run
        is alive for as long as that process is.
        """
        with contextlib.suppress(CheckpointError):
            if self.alone(wait_s=wait_s):
                with contextlib.suppress(CheckpointError):
                    self.check()
                    failpoint("lease.ending")
                    self.path.unlink()
        self.release()


def live_runs(directory: Path) -> dict[str, Owner]:
    """Return the runs whose lease is held right now. Call it under :func:`guard` to rely on it."""
    return known_runs(directory)[0]


def known_runs(directory: Path) -> tuple[dict[str, Owner], dict[str, Owner]]:
    """Return the live runs, and those that ended without removing their lease, as it seems killed.

    Call it under :func:`guard`: to look at a lease that nobody holds is to hold it for a moment,
    and whoever looks at it then takes its run for a live one.
    """
    live: dict[str, Owner] = {}
    killed: dict[str, Owner] = {}
    for path in _lease_files(directory):
        held = _is_held(path)
        # One that is gone by now has ended as it should.
        if held or path.exists():
            (live if held else killed)[path.name.removesuffix(_SUFFIX)] = _read_owner(path)
    return live, killed


@contextlib.contextmanager
def guard(directory: Path) -> Iterator[None]:
    """Hold the checkpoint's exclusive lock. For moments: nothing slow belongs under it.

    Raises:
        CheckpointError: the directory cannot be written to.
    """
    path = directory / _GUARD
    try:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except PermissionError:
            # Somebody who may only look can still keep out of the others' way.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {directory} cannot be locked: {error}. It must be a directory that "
            "this process may write to."
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lease_files(directory: Path) -> list[Path]:
    """List the leases in ``directory``, and no file of others that is called like one."""
    return [
        path
        for path in sorted(directory.glob(f"*{_SUFFIX}"))
        # The name of a run's lease says whose it is, even if nothing was written into it yet.
        if is_usual_run(path.stem) or _read_owner(path).pid
    ]


def _first_rival(directory: Path, claim: Claim) -> Owner | None:
    for path in _lease_files(directory):
        if not _is_held(path):
            # Its run was killed. The run's writer file says what it did; this says nothing more.
            path.unlink(missing_ok=True)
            continue
        # It may end, and remove its lease, between the two looks at it.
        with contextlib.suppress(FileNotFoundError):
            if claim.overlaps(_read_claim(path)):
                return _read_owner(path)
    return None


def _is_held(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _read_owner(path: Path) -> Owner:
    try:
        with path.open("rb") as file:
            return Owner.of(json.loads(file.readline()))
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    # It is being written, or was when its run was killed: it is known by its name alone.
    return Owner(path.name.removesuffix(_SUFFIX), "unknown", 0, time.time())


def _read_claim(path: Path) -> Claim:
    _, _, rest = path.read_bytes().partition(b"\n")
    try:
        return Claim.from_bytes(rest)
    except CheckpointError:
        # It is being written, or was damaged: whatever its run does, it keeps others out.
        return Claim(None)
