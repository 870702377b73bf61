"""Writes into a store what no writer of ours would."""

from __future__ import annotations

from pathlib import Path

import lmdb


def put(file: Path, key: bytes, value: bytes, *, name: bytes = b"meta") -> None:
    """Put a value under a key, past all rules."""
    with (
        lmdb.open(str(file), subdir=False, max_dbs=2) as env,
        env.begin(db=env.open_db(name), write=True) as transaction,
    ):
        transaction.put(key, value)


def put_record(file: Path, digest: bytes, value: bytes) -> None:
    """Put an encoded record in place of that of the same source, or behind all others."""
    with (
        lmdb.open(str(file), subdir=False, max_dbs=2) as env,
        env.begin(db=env.open_db(b"records"), write=True) as transaction,
    ):
        pairs = list(transaction.cursor())
        own = [key for key, stored in pairs if stored.startswith(digest)]
        transaction.put(own[0] if own else len(pairs).to_bytes(8, "big"), digest + value)
