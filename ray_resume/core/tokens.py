"""Tokens, and the two columns that carry them beside a user's rows.

Owns the arithmetic of the counter protocol: what a read puts on its rows, what a UDF call passes
on, and what is left over to be reported as a delta. Knows numpy and pyarrow, and neither Ray,
LMDB, files nor clocks. All sums are modulo 2**64, which is how ``uint64`` arrays add up.

Invariant: whatever happens inside a :class:`CallAccount`, for each source
``sum(tokens that left) + sum(deltas drained) == sum(tokens that came in)``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = [
    "MODULUS",
    "SOURCE_COLUMN",
    "SOURCE_TYPE",
    "TOKEN_COLUMN",
    "TOKEN_TYPE",
    "CallAccount",
    "fresh_nonce",
    "read_nonce",
    "shares",
    "sums_by_source",
    "token_sum",
    "tokens",
]

SourceArray = npt.NDArray[np.int32]
TokenArray = npt.NDArray[np.uint64]

SOURCE_COLUMN = "__ray_resume_source"
"""Column with the source's number in this run's table, ``int32``, never null."""

TOKEN_COLUMN = "__ray_resume_token"
"""Column with the row's token, ``uint64``, never null."""

SOURCE_TYPE = pa.int32()
TOKEN_TYPE = pa.uint64()
MODULUS = 1 << 64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)


def read_nonce(run_id: str, pass_number: int, source_id: str) -> int:
    """Return the 64-bit nonce of a source whose rows come in the same order in each execution.

    A read task that Ray executes again then gives its rows the same tokens, so rows of both
    executions may be mixed as long as each row is consumed once.
    """
    text = f"{run_id}\0{pass_number}\0{source_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def fresh_nonce() -> int:
    """Draw a 64-bit nonce that no seed in user code can repeat."""
    return int.from_bytes(os.urandom(8), "little")


def tokens(nonce: int, start: int, count: int) -> TokenArray:
    """Return the tokens of rows ``start .. start + count - 1``: ``uint64``, shape ``(count,)``.

    Token i is the (i+1)-th output of SplitMix64 (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014) seeded with ``nonce``. It is a function of
    ``(nonce, i)`` alone, so that a source may be read in batches of any size.
    """
    z = np.arange(start + 1, start + 1 + count, dtype=np.uint64)
    z *= _GOLDEN
    z += np.uint64(nonce)
    z ^= z >> _S30
    z *= _MIX_1
    z ^= z >> _S27
    z *= _MIX_2
    z ^= z >> _S31
    return z


def token_sum(values: TokenArray) -> int:
    """Return the sum modulo 2**64 as a Python int."""
    return int(np.add.reduce(values, dtype=np.uint64)) if len(values) else 0


def shares(total: int, count: int) -> TokenArray:
    """Split ``total`` into ``count >= 1`` random shares that add up to it.

    The shares are drawn anew in each call, so shares of two executions of one task never add up
    (but with probability 2**-64): a half-consumed execution is noticed.
    """
    out = tokens(fresh_nonce(), 0, count)
    out[-1] = (total - token_sum(out[:-1])) % MODULUS
    return out


def sums_by_source(sources: SourceArray, values: TokenArray) -> dict[int, int]:
    """Add up ``values`` per source: ``{source number: sum modulo 2**64}``."""
    if len(sources) == 0:
        return {}
    first = int(sources[0])
    if sources[-1] == first and (sources == first).all():
        return {first: token_sum(values)}
    order = np.argsort(sources, kind="stable")
    ordered = sources[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sums = np.add.reduceat(values[order], starts, dtype=np.uint64)
    return dict(zip(ordered[starts].tolist(), sums.tolist(), strict=True))


class CallAccount:
    """The accounts of one UDF call: which sums came in, what has left, what remains.

    Args:
        sources: ``int32``, shape ``(n,)``: source number of each input row.
        values: ``uint64``, shape ``(n,)``: token of each input row.

    Each output batch is announced once, in the order in which it leaves: with :meth:`emit`, the
    last one with :meth:`finish`. :meth:`keep` is for a call whose output rows are input rows. Rows
    that failed are announced before that.
    """

    __slots__ = ("_failed", "_remaining")

    def __init__(self, sources: SourceArray, values: TokenArray) -> None:
        self._remaining = sums_by_source(sources, values)
        self._failed: set[int] = set()

    def emit(self, sources: SourceArray) -> TokenArray:
        """Return random tokens for a batch after which more may follow.

        Args:
            sources: ``int32``, shape ``(m,)``: of each output row, the source it came from.

        Returns:
            ``uint64``, shape ``(m,)``.
        """
        out = tokens(fresh_nonce(), 0, len(sources))
        for source, total in sums_by_source(sources, out).items():
            self._remaining[source] = (self._remaining[source] - total) % MODULUS
        return out

    def finish(self, sources: SourceArray) -> tuple[TokenArray, dict[int, int]]:
        """Return tokens for the last batch, and the deltas of the sources without a row in it.

        Returns:
            ``(tokens, deltas)``: ``uint64`` of shape ``(m,)``, and ``{source: delta}`` with each
            delta in ``0 .. 2**64 - 1``. The deltas must be sent, or those sources stay pending.
        """
        out = self.emit(sources)
        last_rows = _last_row_of_each(sources)
        for source, row in last_rows.items():
            out[row] = (int(out[row]) + self._remaining.pop(source)) % MODULUS
        return out, self._drain()

    def keep(
        self, sources: SourceArray, values: TokenArray, kept: npt.NDArray[np.bool_]
    ) -> tuple[TokenArray, dict[int, int]]:
        """Let the rows marked in ``kept`` pass with their own tokens; account for the others.

        The last survivor of a source takes what its dropped rows carried; a source without a
        survivor gives a delta. ``sources`` and ``values`` are the call's whole input.

        Returns:
            ``(tokens of the kept rows, deltas)`` as :meth:`finish`.
        """
        out = values[kept]
        survivors = sources[kept]
        for source, total in sums_by_source(survivors, out).items():
            self._remaining[source] = (self._remaining[source] - total) % MODULUS
        for source, row in _last_row_of_each(survivors).items():
            out[row] = (int(out[row]) + self._remaining.pop(source)) % MODULUS
        return out, self._drain()

    def fail(self, sources: SourceArray, values: TokenArray) -> dict[int, int]:
        """Take failed input rows out of the accounts; return what they carried, by source.

        Args:
            sources, values: of these rows, as on construction.
        """
        sums = sums_by_source(sources, values)
        for source, total in sums.items():
            self._remaining[source] = (self._remaining[source] - total) % MODULUS
        self._failed |= sums.keys()
        return sums

    def fail_rest(self) -> dict[int, int]:
        """Take all that has not left out of the accounts; return it, by source."""
        rest, self._remaining = self._remaining, {}
        return rest

    def _drain(self) -> dict[int, int]:
        deltas = {
            source: -total % MODULUS
            for source, total in self._remaining.items()
            # If all rows of a source have failed, nothing of it has left here.
            if total or source not in self._failed
        }
        self._remaining = {}
        return deltas


def _last_row_of_each(sources: SourceArray) -> Mapping[int, int]:
    n = len(sources)
    if n == 0:
        return {}
    last = int(sources[-1])
    if sources[0] == last and (sources == last).all():
        return {last: n - 1}
    found, from_the_end = np.unique(sources[::-1], return_index=True)
    return dict(zip(found.tolist(), (n - 1 - from_the_end).tolist(), strict=True))
