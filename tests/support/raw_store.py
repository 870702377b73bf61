"""Writes into a store what no writer of ours would."""

from __future__ import annotations

from pathlib import Path

import lmdb

from ray_resume.core.records import block_of, stored_in


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
        blocks = [block for _, block in transaction.cursor()]
        stored = [record for block in blocks for record in stored_in(block)]
        stored = [digest + value if old.startswith(digest) else old for old in stored]
        stored += [] if digest + value in stored else [digest + value]
        for number in range(len(blocks)):
            transaction.delete(number.to_bytes(8, "big"))
        transaction.put(bytes(8), block_of(stored))


def scatter_records(file: Path) -> None:
    """Put each record into a block of its own, so that they take many pages of LMDB's tree."""
    with (
        lmdb.open(str(file), subdir=False, max_dbs=2) as env,
        env.begin(db=env.open_db(b"records"), write=True) as transaction,
    ):
        stored = [record for _, block in transaction.cursor() for record in stored_in(block)]
        for number, record in enumerate(stored):
            transaction.put(number.to_bytes(8, "big"), block_of([record]))
