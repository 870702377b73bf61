"""Leases: which runs are alive, who they are, and which sources are their own.

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
import math
import os
import socket
import time
import zlib
from collections.abc import Collection, Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from ray_resume.core.filenames import is_usual_run
from ray_resume.errors import CheckpointError
from ray_resume.failpoints import reached

__all__ = ["Claim", "Lease", "Owner", "guard", "known_runs", "live_runs", "refusal"]

_SUFFIX = ".lease"
_GUARD = "lock"
_POLL_INTERVAL_S = 0.1
_DIGEST_BYTES = 16
# So many digests are compared in the time that it takes to load numpy.
_FEW = 20_000


@dataclass(frozen=True)
class Owner:
    """Who holds a lease, and of which shard: for messages to people, never for decisions."""

    run_id: str
    host: str
    pid: int
    started_at: float
    shard: str | None = None

    @classmethod
    def here(cls, run_id: str, shard: str | None = None) -> Owner:
        """Describe this process."""
        return cls(run_id, socket.gethostname(), os.getpid(), time.time(), shard)

    @classmethod
    def of(cls, values: Any) -> Owner:
        """Read what ``asdict`` gives.

        Raises:
            ValueError, TypeError: it is anything else.
        """
        owner = cls(**values)
        *kinds, of_shard = map(type, astuple(owner))
        if kinds != [str, str, int, float] or of_shard not in (str, type(None)):
            raise TypeError(f"{values!r} is not the owner of a lease")
        if not math.isfinite(owner.started_at):
            raise ValueError("the owner of a lease has started at no time")
        return owner

    def __str__(self) -> str:
        age_s = max(0, round(time.time() - self.started_at))
        shard = "" if self.shard is None else f"{self.shard}, "
        return f"run {self.run_id} ({shard}host {self.host}, pid {self.pid}, started {age_s} s ago)"


class Claim:
    """The sources that a lease makes a run's own, as digests; ``None``: all of the shard.

    Args:
        digests: of 16 bytes each; as `bytes`, one after another, where there are many.
        shard: ``(index, count)`` if they are a share of the sources by their digests. Then it is
            known without a look at the digests that claims of disjoint shares do not meet.
    """

    def __init__(
        self,
        digests: Collection[bytes] | bytes | None,
        shard: tuple[int, int] | None = None,
    ) -> None:
        if digests is not None and not isinstance(digests, bytes):
            digests = b"".join(digests)
        self._digests = digests
        self._shard = shard

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Claim):
            return NotImplemented
        return self._shard == other._shard and self._as_set() == other._as_set()

    def __hash__(self) -> int:
        return hash((self._shard, self._as_set()))

    def __repr__(self) -> str:
        what = "everything" if self._digests is None else f"{len(self._digests) // _DIGEST_BYTES}"
        return f"Claim({what}, shard={self._shard})"

    def meets(self, other: Claim) -> bool:
        """Say whether the two runs have a source in common."""
        if self._is_apart_from(other):
            return False
        if self._digests is None or other._digests is None:
            return True
        if not self._digests or not other._digests:
            return False
        if min(len(self._digests), len(other._digests)) < _FEW * _DIGEST_BYTES:
            small, large = sorted((self._digests, other._digests), key=len)
            return not _each(small).isdisjoint(_each(large))
        # Not where it is not needed: it takes as long to load as all the rest.
        from ray_resume.core.digests import Digests, SortedDigests

        mine, theirs = Digests.of(self._digests), Digests.of(other._digests)
        return bool(SortedDigests(mine).holds(theirs).any())

    @property
    def shard(self) -> tuple[int, int] | None:
        """``(index, count)`` of the share that all of its sources are in, if there is one."""
        return self._shard

    def to_bytes(self) -> bytes:
        """Spell it: a line that says what it is, then the digests."""
        count = None if self._digests is None else len(self._digests) // _DIGEST_BYTES
        # As a killed driver leaves it half written, it must not look like less than it is.
        check = _check_of(self._shard, count, self._digests or b"")
        line = {"shard": self._shard, "sources": count, "crc32": check}
        return json.dumps(line).encode() + b"\n" + (self._digests or b"")

    @classmethod
    def from_bytes(cls, data: bytes) -> Claim:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            CheckpointError: it is anything else.
        """
        text, _, digests = data.partition(b"\n")
        try:
            line = json.loads(text)
            shard, count = line["shard"], line["sources"]
            if shard is not None:
                index, of = shard
                if type(index) is not int or type(of) is not int or not 0 <= index < of:
                    raise ValueError(f"its shard is {shard!r}")
                shard = (index, of)
            if line["crc32"] != _check_of(shard, count, digests):
                raise ValueError("it is not as it was written")
            if len(digests) != (count or 0) * _DIGEST_BYTES:
                raise ValueError(f"it has {len(digests)} bytes of the digests of {count} sources")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"The claim of a lease cannot be read: {error}.") from error
        return cls(None if count is None else digests, shard)

    def _as_set(self) -> frozenset[bytes] | None:
        return None if self._digests is None else _each(self._digests)

    def _is_apart_from(self, other: Claim) -> bool:
        """Say whether no number is in both shards: i mod n and j mod m."""
        if self._shard is None or other._shard is None:
            return False
        (index, count), (another, of) = self._shard, other._shard
        return (index - another) % math.gcd(count, of) != 0


def _check_of(shard: tuple[int, int] | None, count: int | None, digests: bytes) -> int:
    return zlib.crc32(digests, zlib.crc32(json.dumps([shard, count]).encode()))


def _each(digests: bytes) -> frozenset[bytes]:
    starts = range(0, len(digests), _DIGEST_BYTES)
    return frozenset(digests[start : start + _DIGEST_BYTES] for start in starts)


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
                raise refusal(str(directory), owner, rival, wait_s)
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
            reached("lease.created")
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
                    reached("lease.ending")
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
            if claim.meets(_read_claim(path)):
                return _read_owner(path)
    return None


def refusal(checkpoint: str, owner: Owner, rival: Owner, wait_s: float) -> CheckpointError:
    """Tell run ``owner`` that it has waited for ``rival`` in vain."""
    return CheckpointError(
        f"The checkpoint {checkpoint} is in use: {rival} is working on the same sources, and "
        f"still was after {wait_s:g} s. Wait until it ends, or end it"
        + (f" (on host {rival.host}: kill {rival.pid})" if rival.pid else "")
        + ", and run again."
        + _about_shards(owner, rival)
    )


def _about_shards(owner: Owner, rival: Owner) -> str:
    if owner.shard is None and rival.shard is None:
        return ""
    ours, theirs = owner.shard or "everything", rival.shard or "everything"
    if ours == theirs:
        return (
            f" Both are to do {ours}: was the array submitted twice, or a task started again while "
            "it was still at work?"
        )
    return (
        f" This run is to do {ours}, and that one does {theirs}: only different shards of one "
        "count have no source in common."
    )


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
