"""Records: what goes in comes out, and what is not a record is an error of ours."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ray_resume.core.digests import source_digest
from ray_resume.core.records import (
    HEAD,
    Fingerprint,
    Record,
    State,
    block_of,
    decode,
    encode,
    encode_completed,
    precedence,
    stored_in,
)
from ray_resume.errors import CheckpointError

# Lone surrogates too: that is how Python spells file names that are not UTF-8.
anything = st.text(st.characters(exclude_categories=()))
texts = anything | anything.map(lambda text: (text + "\nß")[:8] * 1250)
numbers = st.integers(-(2**63), 2**63 - 1)

records = st.builds(
    Record,
    source_id=texts,
    state=st.sampled_from(State),
    sequence=st.integers(0, 2**64 - 1),
    run_id=anything,
    rows=numbers,
    files=st.lists(texts, max_size=4).map(tuple),
    error=st.none() | texts,
    failed_runs=numbers,
    completed_at=st.none() | st.floats(allow_nan=False),
    fingerprint=st.builds(Fingerprint, st.none() | numbers, st.none() | numbers),
    pipeline=st.binary(min_size=8, max_size=8),
    failed_at=st.none() | st.floats(allow_nan=False),
    dead_rows=numbers,
    dead_letters=st.lists(texts, max_size=2).map(tuple),
)

CHECKPOINT, RUN, RANDOM = "0a1b2c3d", "0123456789ab", "fedcba9876543210"


def output_file(source_id: str, run_id: str = RUN, ending: str = "parquet") -> str:
    return f"{CHECKPOINT}-{run_id}-{source_digest(source_id)[:8].hex()}-{RANDOM}.{ending}"


PLAIN = Record("s3://bucket/a.parquet", State.COMPLETED, 7, RUN)
USUAL = Record(
    "a",
    State.COMPLETED,
    7,
    RUN,
    rows=3,
    files=(output_file("a"),),
    completed_at=1.5,
    fingerprint=Fingerprint(10, 20),
    pipeline=b"pipeline",
)
SHARED = output_file("a").replace(source_digest("a")[:8].hex(), "0" * 16)
FULL = Record(
    source_id="naïve\n\udcff",
    state=State.FAILED,
    sequence=258,
    run_id="run",
    rows=3,
    files=("a-1.parquet", "b"),
    error="boom",
    failed_runs=2,
    completed_at=1.5,
    fingerprint=Fingerprint(10, 20),
    pipeline=b"pipeline",
    failed_at=2.5,
    dead_rows=4,
    dead_letters=("d",),
)


@given(records)
@example(PLAIN)
@example(FULL)
@example(USUAL)
@example(replace(USUAL, files=(SHARED,)))
@example(replace(USUAL, files=(SHARED, output_file("a"))))
@example(replace(USUAL, files=(output_file("b"),)))
@example(replace(USUAL, files=(output_file("a", "a" * 12),)))
@example(replace(USUAL, files=(output_file("a", ending="txt"),)))
@example(replace(USUAL, files=("k=1/" + output_file("a"),)))
@example(replace(USUAL, files=(output_file("a").upper(),)))
@example(replace(USUAL, run_id="0123456789AB"))
@example(replace(USUAL, run_id="0123456789a "))
@example(Record("\ud800\udc00", State.RESET, 0, ""))
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    back = decode(encode(record))
    assert back == record
    assert source_digest(back.source_id) == source_digest(record.source_id)


@given(records)
def test_precedence_is_the_sequence_without_parsing(record: Record) -> None:
    assert precedence(encode(record)) == record.sequence


def test_bytes_that_are_in_checkpoints_already_stay_readable() -> None:
    value = bytes.fromhex(
        "010f000123456789ab0a1b2c3d01000000070000000000000003000000000000000a00000000000000"
        "1400000000000000000000000000f83f706970656c696e65fedcba987654321061"
    )
    assert encode(USUAL) == value
    assert decode(value) == USUAL
    more = b'["run",["a-1.parquet","b"],"boom",2,2.5,4,["d"]]'
    assert encode(FULL).endswith("naïve\n\udcff".encode("utf-8", "surrogatepass") + more)
    assert len(encode(USUAL)) == HEAD.size + 1


@pytest.mark.parametrize(
    "record",
    [
        USUAL,
        replace(USUAL, files=()),
        replace(USUAL, files=(SHARED,)),
        replace(USUAL, fingerprint=Fingerprint(None, 5)),
        replace(USUAL, source_id="\udcff", files=(output_file("\udcff", ending="csv"),)),
    ],
)
def test_the_short_way_to_encode_gives_the_same(record: Record) -> None:
    assert completed(record) == source_digest(record.source_id) + encode(record)


def completed(record: Record) -> bytes | None:
    assert record.completed_at is not None
    return encode_completed(
        record.source_id.encode("utf-8", "surrogatepass"),
        bytes.fromhex(record.run_id),
        record.sequence,
        record.rows,
        record.files[0] if record.files else None,
        record.fingerprint.size,
        record.fingerprint.mtime_ns,
        record.completed_at,
        record.pipeline,
    )


@pytest.mark.parametrize(
    "file", ["b", output_file("b"), output_file("a", "a" * 12), output_file("a", ending="txt")]
)
def test_what_cannot_be_encoded_the_short_way_is_not(file: str) -> None:
    assert completed(replace(USUAL, files=(file,))) is None


def _read_or_refused(value: bytes) -> None:
    try:
        record = decode(value)
    except CheckpointError:
        return
    assert repr(decode(encode(record))) == repr(record)  # repr, since NaN is not equal to itself
    assert precedence(value) == record.sequence


def with_json(text: bytes) -> bytes:
    """FULL, with other JSON behind its id."""
    return encode(FULL)[: HEAD.size + len("naïve\n\udcff".encode("utf-8", "surrogatepass"))] + text


@given(st.binary())
@example(b"")
@example(with_json(b"[" * 100_000))
@example(with_json(b'["", null, null, 1e400, null, 0, []]'))
@example(with_json(b'["",null,null,0,1%s,0,[]]' % (b"0" * 400)))
@example(with_json(b"9" * 10_000))
@example(with_json(b"\xff\xfe[]"))
@example(with_json(b""))
@example(encode(USUAL) + b"x")
@example(encode(USUAL)[:-1])
@example(b"\x00" + encode(USUAL)[1:])
@example(b"\x01\x4f" + encode(USUAL)[2:])
@example(b"\x01\x0f\x05" + encode(USUAL)[3:])
def test_arbitrary_bytes_are_refused(value: bytes) -> None:
    _read_or_refused(value)


@given(records, st.data())
def test_damaged_records_are_refused_or_other_records(record: Record, data: st.DataObject) -> None:
    value = bytearray(encode(record))
    start = data.draw(st.integers(0, len(value)))
    stop = data.draw(st.integers(start, min(len(value), start + 20)))
    value[start:stop] = data.draw(st.binary(max_size=20))
    _read_or_refused(bytes(value))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=11) | st.dictionaries(st.text(), children),
    max_leaves=20,
)


@given(json_values)
def test_json_of_another_shape_is_refused(body: object) -> None:
    _read_or_refused(with_json(json.dumps(body).encode()))


# Texts are in the places 0 and 2; the time in 4 is whatever is as good as a float.
WRONG_TYPES: list[object] = [{}, [1], True, "2"]
WRONG = [
    (place, wrong)
    for place in range(7)
    for wrong in WRONG_TYPES
    if not (wrong == "2" and place in (0, 2, 4)) and not (wrong is True and place == 4)
]


@pytest.mark.parametrize(("place", "wrong"), WRONG)
def test_a_field_of_another_type_is_refused(place: int, wrong: object) -> None:
    body = ["run", ["a-1.parquet", "b"], "boom", 2, 2.5, 4, ["d"]]
    assert decode(with_json(json.dumps(body).encode())) == FULL
    body[place] = wrong
    with pytest.raises(CheckpointError):
        decode(with_json(json.dumps(body).encode()))


def test_precedence_of_less_than_a_head_is_refused() -> None:
    with pytest.raises(CheckpointError):
        precedence(b"\x01\x02")


def test_digests_are_the_same_in_every_version() -> None:
    assert source_digest("s3://bucket/a.parquet").hex() == "1e501e5877894aec4a2a24002c2182dd"
    assert source_digest("naïve\n\udcff").hex() == "c08b5b528a71bb46ffdce2a3bb7927af"


@given(texts, texts)
def test_digests_fit_into_a_key_and_tell_sources_apart(one: str, other: str) -> None:
    assert len(source_digest(one)) == 16
    assert (source_digest(one) == source_digest(other)) == (one == other)


# Blocks -------------------------------------------------------------------------------------------


@given(st.lists(records, max_size=4), st.binary(max_size=10))
def test_a_block_gives_back_what_was_put_into_it(some: list[Record], damaged: bytes) -> None:
    stored = [source_digest(record.source_id) + encode(record) for record in some]
    stored.append(bytes(16) + damaged)
    assert list(stored_in(block_of(stored))) == stored


@given(st.data())
def test_a_block_that_was_damaged_is_refused(data: st.DataObject) -> None:
    sound = block_of([source_digest(record.source_id) + encode(record) for record in (USUAL, FULL)])
    at = data.draw(st.integers(0, len(sound) - 1))
    instead = data.draw(st.binary(max_size=2))
    damaged = sound[:at] + instead + sound[at + 1 :]
    if damaged != sound:
        with pytest.raises(CheckpointError):
            list(stored_in(damaged))
    with pytest.raises(CheckpointError):
        list(stored_in(sound[:at]))
