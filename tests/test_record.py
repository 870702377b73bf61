"""Records: what goes in comes out, and what is not a record is an error of ours."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ray_resume.errors import CheckpointError
from ray_resume.record import Fingerprint, Record, State, decode, digest, encode, precedence

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
    signature=anything,
)

PLAIN = Record("s3://bucket/a.parquet", State.COMPLETED, 7, "0123456789ab")
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
    signature="f>g",
)


@given(records)
@example(PLAIN)
@example(FULL)
@example(Record("\ud800\udc00", State.RESET, 0, ""))
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    back = decode(encode(record))
    assert back == record
    assert digest(back.source_id) == digest(record.source_id)


@given(records)
def test_precedence_is_the_sequence_without_parsing(record: Record) -> None:
    assert precedence(encode(record)) == record.sequence


def test_bytes_that_are_in_checkpoints_already_stay_readable() -> None:
    value = (
        b"\x02\x02\x01\x00\x00\x00\x00\x00\x00"
        b'["na\xc3\xafve\\n\xed\xb3\xbf","run",3,["a-1.parquet","b"],"boom",2,1.5,10,20,"f>g"]'
    )
    assert decode(value) == FULL
    assert encode(FULL) == value[:-1] + b",null,0,[]]"


def _read_or_refused(value: bytes) -> None:
    try:
        record = decode(value)
    except CheckpointError:
        return
    assert repr(decode(encode(record))) == repr(record)  # repr, since NaN is not equal to itself
    assert precedence(value) == record.sequence


@given(st.binary())
@example(b"")
@example(b"\x01" + bytes(8) + b"[" * 100_000)
@example(b"\x01" + bytes(8) + b'["", "", 1e400, [], null, 0, 1e400, null, null, ""]')
@example(b"\x01" + bytes(8) + b'["","",0,[],null,0,1%s,null,null,""]' % (b"0" * 400))
@example(b"\x01" + bytes(8) + b"9" * 10_000)
@example(b"\x01" + bytes(8) + b"\xff\xfe[]")
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


@given(json_values, st.integers(0, 5))
def test_json_of_another_shape_is_refused(body: object, state: int) -> None:
    _read_or_refused(struct.pack("<BQ", state, 1) + json.dumps(body).encode())


# Texts are in the places 0, 1, 4 and 9; the time in 6 is whatever is as good as a float.
WRONG_TYPES: list[object] = [{}, [1], True, "2"]
WRONG = [
    (place, wrong)
    for place in range(10)
    for wrong in WRONG_TYPES
    if not (wrong == "2" and place in (0, 1, 4, 6, 9)) and not (wrong is True and place == 6)
]


@pytest.mark.parametrize(("place", "wrong"), WRONG)
def test_a_field_of_another_type_is_refused(place: int, wrong: object) -> None:
    head, body = encode(FULL)[:9], json.loads(encode(FULL)[9:])
    body[place] = wrong
    with pytest.raises(CheckpointError):
        decode(head + json.dumps(body).encode())


def test_precedence_of_less_than_a_head_is_refused() -> None:
    with pytest.raises(CheckpointError):
        precedence(b"\x01\x02")


def test_digests_are_the_same_in_every_version() -> None:
    assert digest("s3://bucket/a.parquet").hex() == "1e501e5877894aec4a2a24002c2182dd"
    assert digest("naïve\n\udcff").hex() == "c08b5b528a71bb46ffdce2a3bb7927af"


@given(texts, texts)
def test_digests_fit_into_a_key_and_tell_sources_apart(one: str, other: str) -> None:
    assert len(digest(one)) == 16
    assert (digest(one) == digest(other)) == (one == other)
