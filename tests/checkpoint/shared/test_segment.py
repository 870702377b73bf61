"""Segments: what is written comes back, damage is told, and what counts of a run is exact."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_resume.checkpoint.shared import segments
from ray_resume.checkpoint.shared.segments import (
    counted_segments,
    decode,
    encode,
    fence_name,
    full_name,
    incremental_name,
    last_number,
)
from ray_resume.errors import CheckpointError

pytestmark = pytest.mark.long

blocks = st.lists(st.binary(max_size=40))
headers = st.dictionaries(st.text(), st.none() | st.integers() | st.text(), max_size=4)


@given(headers, blocks)
def test_what_is_written_comes_back(header: dict[str, object], given: list[bytes]) -> None:
    header.pop("segment_format", None)
    assert decode(encode(header, given)) == (header, given)


@given(st.data())
def test_every_flipped_bit_and_every_cut_is_told(data: st.DataObject) -> None:
    whole = encode({"run_id": "a"}, [b"k" * 16, b"value", b""])
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    for damaged in (bytes(flipped), whole[:at], whole + whole[at:]):
        with pytest.raises(CheckpointError):
            decode(damaged)


@given(st.binary())
def test_anything_else_is_told(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        decode(data)
    # Also with a checksum that is right.
    body = segments._MAGIC + data
    with pytest.raises(CheckpointError):
        decode(body + segments._checksum(body))


def test_a_newer_format_asks_for_an_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "_FORMAT_VERSION", segments._FORMAT_VERSION + 1)
    newer = encode({}, [])
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format 4.*upgrade"):
        decode(newer)


def test_an_older_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are of another make, whatever their checksum says."""
    monkeypatch.setattr(segments, "_FORMAT_VERSION", 1)
    older = encode({}, [])
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"format 1, .* format 3; .* start over"):
        decode(older)


def test_the_header_is_plain_data() -> None:
    assert json.dumps({"run_id": "a", "segment_format": 3}).encode() in encode({"run_id": "a"}, [])


def names_of(numbers: range, wholes: set[int]) -> list[str]:
    return [full_name(n) if n in wholes else incremental_name(n) for n in numbers]


@given(st.integers(1, 12), st.sets(st.integers(1, 12)), st.lists(st.integers(0, 12)), st.data())
def test_what_counts(last: int, wholes: set[int], fences: list[int], data: st.DataObject) -> None:
    """What a writer may leave: all segments, or some of those before a whole that was confirmed."""
    names = names_of(range(1, last + 1), wholes)
    confirmed = [n for n in wholes if n <= last and all(f >= n for f in fences)]
    if confirmed:
        removable = names[: data.draw(st.sampled_from(confirmed)) - 1]
        names = [
            n for n in names if n not in data.draw(st.sets(st.sampled_from(removable or [""])))
        ]
    assert last_number(names) == last
    fenced = [min(fence, last) for fence in fences]
    everything = [*names, *(fence_name(f"{i:012x}", f) for i, f in enumerate(fenced))]
    counted = counted_segments(data.draw(st.permutations(everything)))
    limit = min(fenced, default=last)
    if limit == 0:
        assert counted == []
        return
    first = max((n for n in wholes if n <= limit), default=1)
    assert counted == names_of(range(first, limit + 1), wholes)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        ([incremental_name(2)], 1),
        ([incremental_name(1), incremental_name(3)], 2),
        ([full_name(4), incremental_name(6)], 5),
        ([incremental_name(1), incremental_name(2), fence_name("a" * 12, 3)], 3),
        ([full_name(4), fence_name("a" * 12, 3)], 3),
        ([fence_name("a" * 12, 2)], 2),
        ([incremental_name(5), fence_name("a" * 12, 4), incremental_name(1)], 2),
    ],
)
def test_a_missing_segment_is_told(names: list[str], missing: int) -> None:
    with pytest.raises(CheckpointError, match=rf"segment [{missing}4] is missing"):
        counted_segments(names)


def test_other_names_are_passed_over() -> None:
    assert counted_segments(
        ["readme", "1.part", "fence-x-1", incremental_name(1), ".000000002.part"]
    ) == [incremental_name(1)]
