"""Writes into a store what no writer of ours would."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import pyarrow as pa

from ray_resume.core import records as records_module
from ray_resume.core.records import SCHEMA, Record, decode, encode, encode_batches, records_of


def put(file: Path, key: bytes, value: bytes, *, name: bytes = b"meta") -> None:
    """Put a value under a key, past all rules."""
    with (
        lmdb.open(str(file), subdir=False, max_dbs=2) as env,
        env.begin(db=env.open_db(name), write=True) as transaction,
    ):
        transaction.put(key, value)


def put_block(file: Path, block: bytes) -> None:
    """Put any bytes in place of the first block of records, or as the first."""
    put(file, bytes(8), block, name=b"records")


def put_record(file: Path, digest: bytes, record: Record) -> None:
    """Put a record in place of that of the source with this digest, or behind all others."""
    with _records(file) as (transaction, batches):
        stored = {
            key: old
            for batch in batches
            for key, old in zip(batch.column("digest").to_pylist(), records_of(batch), strict=True)
        }
        stored[digest] = record
        batch = records_module._batch(list(stored.values()))
        keys = pa.array(list(stored), SCHEMA.field("digest").type)
        batch = pa.RecordBatch.from_arrays([keys, *batch.columns[1:]], schema=SCHEMA)
        _put_blocks(transaction, encode_batches([batch]))


def scatter_records(file: Path) -> None:
    """Put each record into a block of its own, so that they take many pages of LMDB's tree."""
    with _records(file) as (transaction, batches):
        every = [record for batch in batches for record in records_of(batch)]
        _put_blocks(transaction, (block for record in every for block in encode([record])))


@contextmanager
def _records(file: Path) -> Iterator[tuple[Any, list[pa.RecordBatch]]]:
    """Take all blocks out of a file; yield the transaction, and what was in them."""
    with (
        lmdb.open(str(file), subdir=False, max_dbs=2) as env,
        env.begin(db=env.open_db(b"records"), write=True) as transaction,
    ):
        blocks = list(transaction.cursor())
        for key, _ in blocks:
            transaction.delete(key)
        yield transaction, [decode(block) for _, block in blocks]


def _put_blocks(transaction: Any, blocks: Iterable[bytes]) -> None:
    for number, block in enumerate(blocks):
        transaction.put(number.to_bytes(8, "big"), block)
