"""Claims and owners: what a lease says about its run.

Owns which sources a run may work on, whether two runs have any of them in common, and the error of
the run that is refused. `local.lease` and `shared` keep leases, and decide which runs are alive.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
import zlib
from collections.abc import Collection
from dataclasses import astuple, dataclass
from typing import Any

from typing_extensions import override

from ray_resume.errors import CheckpointError

__all__ = ["Claim", "Owner", "in_use_error", "warn_waiting"]

logger = logging.getLogger("ray_resume")

_DIGEST_BYTES = 16
# So many digests are compared in the time that it takes to load numpy.
_SMALL_CLAIM = 20_000


@dataclass(frozen=True)
class Owner:
    """The process that took a lease, and its shard: for messages, never for decisions."""

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
            ValueError, TypeError: the values are anything else.
        """
        owner = cls(**values)
        *kinds, of_shard = map(type, astuple(owner))
        if kinds != [str, str, int, float] or of_shard not in (str, type(None)):
            raise TypeError(f"{values!r} is not the owner of a lease")
        if not math.isfinite(owner.started_at):
            raise ValueError("the owner of a lease has started at no time")
        return owner

    @override
    def __str__(self) -> str:
        age_s = max(0, round(time.time() - self.started_at))
        shard = "" if self.shard is None else f"{self.shard}, "
        return f"run {self.run_id} ({shard}host {self.host}, pid {self.pid}, started {age_s} s ago)"


class Claim:
    """The sources that a lease reserves for a run, as digests; ``None``: all of the shard.

    Args:
        digests: of 16 bytes each; as `bytes`, one after another, where there are many.
        shard: ``(index, count)`` if they are a share of the sources by their digests. Claims of
            disjoint shares do not overlap, whatever their digests.
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

    @override
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Claim):
            return NotImplemented
        return self._shard == other._shard and self._as_set() == other._as_set()

    @override
    def __hash__(self) -> int:
        return hash((self._shard, self._as_set()))

    @override
    def __repr__(self) -> str:
        what = "everything" if self._digests is None else f"{len(self._digests) // _DIGEST_BYTES}"
        return f"Claim({what}, shard={self._shard})"

    def overlaps(self, other: Claim) -> bool:
        """Say whether the two runs have a source in common."""
        if self._is_apart_from(other):
            return False
        if self._digests is None or other._digests is None:
            return True
        if not self._digests or not other._digests:
            return False
        if min(len(self._digests), len(other._digests)) < _SMALL_CLAIM * _DIGEST_BYTES:
            small, large = sorted((self._digests, other._digests), key=len)
            return not _each(small).isdisjoint(_each(large))
        # Imported here: it takes as long to load as all the rest.
        from ray_resume.core.digests import DigestIndex, Digests

        mine, theirs = Digests.of(self._digests), Digests.of(other._digests)
        return bool(DigestIndex(mine).holds(theirs).any())

    @property
    def shard(self) -> tuple[int, int] | None:
        """``(index, count)`` of the share that all of its sources are in, if there is one."""
        return self._shard

    def to_bytes(self) -> bytes:
        """Serialize the claim: a line of JSON, then the digests."""
        count = None if self._digests is None else len(self._digests) // _DIGEST_BYTES
        # A killed driver may leave half of it, which must not pass for a smaller claim.
        check = _check_of(self._shard, count, self._digests or b"")
        line = {"shard": self._shard, "sources": count, "crc32": check}
        return json.dumps(line).encode() + b"\n" + (self._digests or b"")

    @classmethod
    def from_bytes(cls, data: bytes) -> Claim:
        """Read what :meth:`to_bytes` wrote.

        Raises:
            CheckpointError: the data is anything else.
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


def warn_waiting(checkpoint: str, owner: Owner, rival: Owner, wait_s: float) -> None:
    """Log at once that run ``owner`` waits for ``rival``, if it does."""
    if wait_s > 0:
        logger.warning(
            "Run %s waits up to %.0f s for %s, which is working on the same sources of %s.",
            owner.run_id,
            wait_s,
            rival,
            checkpoint,
        )


def in_use_error(checkpoint: str, owner: Owner, rival: Owner, wait_s: float) -> CheckpointError:
    """Return the error of run ``owner``, which has waited for ``rival`` in vain."""
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
