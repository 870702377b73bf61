"""Records: what goes in comes out, and what is not a block of records is an error of ours."""

from __future__ import annotations

import pickle
import struct
import tracemalloc
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ray_resume.core import records as records_module
from ray_resume.core.columns import numbers_of
from ray_resume.core.digests import source_digest
from ray_resume.core.parts import FilePart
from ray_resume.core.record_log import Flag, RecordLog
from ray_resume.core.records import (
    MAX_BLOCK_BYTES,
    RECORDS_IN_BLOCK,
    SCHEMA,
    Fingerprint,
    Record,
    State,
    decode,
    encode,
    encode_batches,
    records_of,
)
from ray_resume.errors import CheckpointError

# Lone surrogates too: they stand for file names that are not UTF-8.
anything = st.text(st.characters(exclude_categories=()))
texts = anything | anything.map(lambda text: (text + "\nß")[:8] * 1250)
numbers = st.integers(-(2**63), 2**63 - 1)
times = st.none() | st.floats(allow_nan=False, allow_infinity=False)

parts = st.builds(
    lambda file, before, rows, after: FilePart(file, before, rows, before + rows + after),
    texts,
    st.integers(0, 2**61),
    st.integers(1, 2**61),
    st.integers(0, 2**61),
)

records = st.builds(
    Record,
    source_id=texts,
    state=st.sampled_from(State),
    sequence=st.integers(0, 2**64 - 1),
    run_id=anything,
    rows=numbers,
    parts=st.lists(parts, max_size=4).map(tuple),
    error=st.none() | texts,
    failed_runs=numbers,
    completed_at=times,
    fingerprint=st.builds(Fingerprint, st.none() | numbers, st.none() | numbers),
    pipeline=st.binary(min_size=8, max_size=8),
    failed_at=times,
    dead_rows=numbers,
    dead_letters=st.lists(texts, max_size=2).map(tuple),
    end=st.none() | st.integers(1, 2**63 - 1),
)

PLAIN = Record("s3://bucket/a.parquet", State.COMPLETED, 7, "0123456789ab")
FULL = Record(
    source_id="naïve\n\udcff",
    state=State.FAILED,
    sequence=258,
    run_id="run",
    rows=3,
    parts=(FilePart("a-1.parquet", 5, 2, 9), FilePart("b", 0, 1, 1)),
    error="boom",
    failed_runs=2,
    completed_at=1.5,
    fingerprint=Fingerprint(10, 20),
    pipeline=b"pipeline",
    failed_at=2.5,
    dead_rows=4,
    dead_letters=("d",),
)

# FULL, as format 4 of the store has it.
BLOCK = (
    "3f824e6f01500600000000000028b52ffd605005d50b0086163f37508b92d628b7ddc30142d1368b3ff51a7325"
    "90b0127c9c2d38733edaebf7f4097fdd970b7406657710d7bdb678acbd9035e1d808d9320529002d0029001123"
    "5e8810ede5a5a5f4aeeb9aa07dfd60dcf242a3524b237029f47c347a2b011c30fa70e5324dd314274f5e93266f"
    "c992500d2f27e73a72e40d19720509f27efcb87af4783b768c3e18ad58f152a478274e7c4abc011ba605241a14"
    "1834a8c069adb5d65a6bad6a55ab5ad55a6bad4926ddba7badbd9d9d3765ca8b12e50d7f073748029ad15c6064"
    "36179b07059d15848c0c8b4301ae9aaa5c5944c870686c6036071018c008501a8e8d3fa6305ce860c94810c980"
    "d188149840628143808aa87118b5a42049619a03b09314321c11400c9a29818804dd7e067f06b0a4e4ab61aebb"
    "31f601df36812c70d319fde26219a10168fd0910813e780db6c66adcdbae419453e633f0c3463ef0818fb378ad"
    "1a5809da8ecd6d831640b1699b1d38ff8a7bd6c4159deed4be62694bc64c4f54963eaa12adb6320e15"
)


def back(blocks: list[bytes]) -> list[Record]:
    return [record for block in blocks for record in records_of(decode(block))]


@given(st.lists(records, max_size=4))
@example([PLAIN, FULL])
@example([Record("\ud800\udc00", State.RESET, 0, "")])
def test_records_come_back_as_they_were(some: list[Record]) -> None:
    blocks = list(encode(some))
    assert back(blocks) == some
    assert len(blocks) == bool(some)
    assert list(encode_batches(map(decode, blocks))) == blocks


def test_blocks_that_are_in_checkpoints_already_stay_readable() -> None:
    """The schema is part of the format: another one needs another format version of the stores."""
    assert back([bytes.fromhex(BLOCK)]) == [FULL]


def test_a_block_has_so_many_records_and_bytes_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [replace(PLAIN, sequence=n) for n in range(1, RECORDS_IN_BLOCK + 2)]
    blocks = list(encode(many))
    assert [len(decode(block)) for block in blocks] == [RECORDS_IN_BLOCK, 1]
    assert back(blocks) == many
    halves = [decode(block).slice(1, RECORDS_IN_BLOCK - 100) for block in blocks[:1]] * 2
    sizes = [len(decode(block)) for block in encode_batches(iter(halves))]
    assert sizes == [RECORDS_IN_BLOCK, RECORDS_IN_BLOCK - 200]
    monkeypatch.setattr(records_module, "MAX_BLOCK_BYTES", 20_000)
    large = [replace(FULL, sequence=n, error="e" * 6_000) for n in range(1, 8)]
    blocks = list(encode([*large, replace(FULL, error="e" * 60_000)]))
    assert len(blocks) > 4
    assert max(map(len, blocks[:-1])) < 20_000 < len(blocks[-1]), "one that is too large is alone"
    assert back(blocks) == [*large, replace(FULL, error="e" * 60_000)]


@pytest.mark.parametrize(
    "wrong",
    [{"sequence": 2**64}, {"sequence": -1}, {"rows": 2**63}, {"pipeline": b"short"}],
)
def test_a_number_without_room_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((OverflowError, ValueError)):
        list(encode([PLAIN, replace(PLAIN, **wrong)]))


# Bytes of others ----------------------------------------------------------------------------------


def sealed(payload: bytes, *, size: int | None = None, compressed: bool = True) -> bytes:
    """A block with a right checksum around any bytes."""
    # With a column of ends, as `SOUND` has one.
    rest = struct.pack("<BQ", compressed | 2, len(payload) if size is None else size)
    rest += pa.compress(payload, "zstd", asbytes=True) if compressed else payload
    return struct.pack("<I", zlib.crc32(rest)) + rest


def message(batch: pa.RecordBatch) -> bytes:
    return bytes(batch.serialize())


def read_or_refused(block: bytes) -> None:
    """Either an error of ours, or records that can be encoded again."""
    try:
        batch = decode(block)
    except CheckpointError:
        return
    found = list(records_of(batch))
    assert back(list(encode(found))) == found
    RecordLog([block])


THRICE = replace(PLAIN, source_id="b", parts=(FilePart("x", 1, 2, 3),) * 3, end=7)
SOUND = decode(next(encode([PLAIN, FULL, THRICE])))


@given(st.binary())
@example(b"")
@example(bytes(13))
@example(pickle.dumps(FULL))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    for block in (data, sealed(data), sealed(data, compressed=False)):
        with pytest.raises(CheckpointError):
            decode(block)


@given(st.data())
def test_a_block_that_was_damaged_is_refused(data: st.DataObject) -> None:
    sound = next(encode([PLAIN, FULL]))
    at = data.draw(st.integers(0, len(sound) - 1))
    damaged = sound[:at] + data.draw(st.binary(max_size=2)) + sound[at + 1 :]
    if damaged != sound:
        with pytest.raises(CheckpointError):
            decode(damaged)
    with pytest.raises(CheckpointError):
        decode(sound[:at])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_batch_that_was_damaged_below_its_checksum_is_refused_or_other_records(
    data: st.DataObject,
) -> None:
    """Arrow trusts what it reads; here anything may be in it, and nothing may crash."""
    raw = bytearray(message(SOUND))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        new = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from(EXTREMES))
        raw[at : at + len(new)] = new
    read_or_refused(sealed(bytes(raw)))


EXTREMES = [
    value.to_bytes(8, "little") for value in (0, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
]


@pytest.mark.extended
@pytest.mark.long
def test_a_batch_with_any_one_byte_changed_is_refused_or_other_records() -> None:
    raw = message(SOUND)
    for at in range(len(raw)):
        value = (0, 0xFF, raw[at] ^ 1, raw[at] ^ 0x80)[at % 4]
        read_or_refused(sealed(raw[:at] + bytes([value]) + raw[at + 1 :]))
    for end in range(0, len(raw), 29):
        read_or_refused(sealed(raw[:end]))


def changed(name: str, values: list[Any]) -> pa.RecordBatch:
    """Two records with other values in a column, nulls among them perhaps."""
    two = SOUND.slice(0, 2)
    arrays = [
        pa.array(values, field.type) if field.name == name else column
        for field, column in zip(SCHEMA, two.columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, names=SCHEMA.names)


WRONG: dict[str, list[tuple[str, list[Any]]]] = {
    "state": [("state", [0, 1]), ("state", [1, 5]), ("state", [1, None])],
    "null": [("digest", [None, bytes(16)]), ("source_id", [b"a", None]), ("files", [None, []])],
    "null in a list": [("files", [[None], []]), ("dead_letters", [[], [b"a", None]])],
    "no text": [("source_id", [b"a", b"\xff"]), ("files", [[b"a"], [b"\xc0"]])],
    "no text either": [("run_id", [b"\x80", b"a"]), ("error", [None, b"\xed"])],
    "no number of ranges": [("end", [0, 1]), ("end", [None, -1])],
    "no time": [("completed_at", [float("nan"), 1]), ("failed_at", [1, float("inf")])],
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_column_with_values_that_no_record_has_is_refused(kind: str) -> None:
    for name, values in WRONG[kind]:
        with pytest.raises(CheckpointError, match="cannot be read"):
            decode(sealed(message(changed(name, values))))


def test_another_schema_and_other_messages_are_refused() -> None:
    other = pa.RecordBatch.from_arrays(SOUND.columns[:-1], names=SCHEMA.names[:-1])
    more = [*SOUND.columns, *SOUND.columns, SOUND.column(0)]
    swapped = [SOUND.column("files"), *SOUND.columns[1:]]
    for columns in (other.columns, more, swapped, SOUND.columns[::-1]):
        batch = pa.RecordBatch.from_arrays(columns, names=[str(n) for n in range(len(columns))])
        read_or_refused(sealed(message(batch)))
    with pytest.raises(CheckpointError):
        decode(sealed(message(other)))
    with pytest.raises(CheckpointError):
        decode(sealed(bytes(SCHEMA.serialize())))


@pytest.mark.long
def test_no_more_memory_is_taken_than_a_block_may_have() -> None:
    """Neither for what it claims, nor for what zstd or Arrow would make of it."""
    zeros = bytes(2 * MAX_BLOCK_BYTES)
    bombs = [
        sealed(message(SOUND), size=2**62),
        sealed(zeros),
        sealed(zeros, size=MAX_BLOCK_BYTES),
        sealed(compressed_batch()),
        sealed(compressed_batch(), compressed=False),
    ]
    del zeros
    for bomb in bombs:
        assert len(bomb) < 200_000
        before = pa.default_memory_pool().max_memory()
        tracemalloc.start()
        with pytest.raises(CheckpointError):
            decode(bomb)
        assert tracemalloc.get_traced_memory()[1] < 2 * MAX_BLOCK_BYTES
        tracemalloc.stop()
        # What the batch takes at most, and nothing for its buffers.
        assert pa.default_memory_pool().max_memory() <= max(before, 2 * MAX_BLOCK_BYTES)


def compressed_batch() -> bytes:
    """A message of 50 kB with buffers that Arrow would decompress to a hundred megabytes."""
    many = pa.Table.from_batches([SOUND.slice(0, 1)] * RECORDS_IN_BLOCK)
    error = pa.array([b"e" * 30_000] * RECORDS_IN_BLOCK, pa.binary())
    many = many.set_column(SCHEMA.get_field_index("error"), SCHEMA.field("error"), error)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, SCHEMA, options=options) as stream:
        stream.write_batch(many.combine_chunks().to_batches()[0])
    reader = pa.ipc.MessageReader.open_stream(sink.getvalue())
    reader.read_next_message()
    return bytes(reader.read_next_message().serialize())


# Logs ---------------------------------------------------------------------------------------------


@given(st.lists(st.lists(records, max_size=3), max_size=3), st.data())
def test_a_log_gives_its_records_and_columns_back(
    parts: list[list[Record]], data: st.DataObject
) -> None:
    every = [record for part in parts for record in part]
    log = RecordLog(block for part in parts for block in encode(part))
    assert len(log) == len(every)
    assert list(log) == every
    assert [log.record(position) for position in range(len(log))] == every
    assert list(pickle.loads(pickle.dumps(log))) == every
    assert log.digests.to_bytes() == b"".join(source_digest(r.source_id) for r in every)
    assert [log.runs[run] for run in log.column("run").tolist()] == [r.run_id for r in every]
    assert log.column("state").tolist() == [record.state.value for record in every]
    assert log.column("sequence").tolist() == [record.sequence for record in every]
    assert log.column("rows").tolist() == [record.rows for record in every]
    assert log.column("size").tolist() == [record.fingerprint.size or 0 for record in every]
    assert log.column("mtime_ns").tolist() == [r.fingerprint.mtime_ns or 0 for r in every]
    assert b"".join(map(bytes, log.column("pipeline"))) == b"".join(r.pipeline for r in every)
    assert log.column("flags").tolist() == [flags_of(record) for record in every]
    for known, record in zip(log.column("completed_at").tolist(), every, strict=True):
        assert known == record.completed_at or (record.completed_at is None and known != known)
    some = sorted(data.draw(st.sets(st.integers(0, len(every) - 1)) if every else st.just(set())))
    found = list(log.batches(np.array(some, np.int64)))
    assert [r for _, batch in found for r in records_of(batch)] == [every[n] for n in some]
    assert [start for start, _ in found] == starts([len(batch) for _, batch in found])


def starts(lengths: list[int]) -> list[int]:
    return [sum(lengths[:n]) for n in range(len(lengths))]


def flags_of(record: Record) -> int:
    return (
        Flag.SIZE * (record.fingerprint.size is not None)
        + Flag.MTIME * (record.fingerprint.mtime_ns is not None)
        + Flag.FILES * bool(record.files)
        + Flag.DEAD_LETTERS * bool(record.dead_letters)
        + Flag.END * (record.end is not None)
    )


def test_a_log_is_as_it_was_after_a_damaged_block() -> None:
    log = RecordLog(encode([PLAIN]))
    with pytest.raises(CheckpointError):
        log.append(b"damaged")
    log.append(next(encode([FULL])))
    assert list(log) == [PLAIN, FULL]


@pytest.mark.long
@given(st.lists(st.sampled_from("abc"), max_size=40))
def test_records_are_found_whatever_was_looked_at_before(asked: list[str]) -> None:
    """The last batches are kept; more blocks than that are here."""
    every = [replace(PLAIN, source_id=f"s{n}", sequence=n) for n in range(12)]
    log = RecordLog(block for record in every for block in encode([record]))
    for name in asked:
        position = (ord(name) * len(asked)) % 12
        assert log.record(position) == every[position]


def test_numbers_in_a_buffer_that_is_longer_than_they_are() -> None:
    data = pa.py_buffer(np.array([1, 2, 3], "u8").tobytes() + b"x")
    column = pa.Array.from_buffers(pa.uint64(), 3, [None, data])
    assert numbers_of(column, "u8").tolist() == [1, 2, 3]
    assert numbers_of(column.slice(1, 1), "u8").tolist() == [2]
    assert numbers_of(column.slice(3), "u8").tolist() == []
