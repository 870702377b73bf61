"""Digests and sources in columns: the same as one by one."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ray_resume.core.digests import DigestIndex, Digests, source_digest
from ray_resume.core.records import Fingerprint
from ray_resume.core.shards import Shard
from ray_resume.core.sources import Source, SourceTable, refuse_repeated

pytestmark = [pytest.mark.extended, pytest.mark.long]

# Digests ------------------------------------------------------------------------------------------


# Few, and with the same first half often, so that the second one has to decide.
halves = st.sampled_from([bytes(8), b"\0" * 7 + b"\1", b"\xff" * 8])
digests = st.builds(lambda high, low: high + low, halves, halves)


@given(st.lists(digests), st.lists(digests))
def test_digests_are_found_as_in_a_dictionary(known: list[bytes], wanted: list[bytes]) -> None:
    index = DigestIndex(Digests.of(b"".join(known)))
    assert [index.digests[rank] for rank in range(len(index))] == sorted(known)
    ranks = index.positions(Digests.of(b"".join(wanted))).tolist()
    for value, rank in zip(wanted, ranks, strict=True):
        assert (rank >= 0) == (value in known)
        assert rank < 0 or index.digests[rank] == value
    repeated = Digests.of(b"".join(known)).duplicates().tolist()
    assert repeated == [i for i, value in enumerate(known) if known.count(value) > 1]


@given(st.lists(st.binary(min_size=16, max_size=16)), st.integers(1, 1 << 40))
def test_a_share_is_the_same_for_all_at_once(values: list[bytes], count: int) -> None:
    rest = Digests.of(b"".join(values)).modulo(count).tolist()
    assert rest == [int.from_bytes(value, "big") % count for value in values]


def test_shards_hold_the_same_sources_as_columns() -> None:
    sources = SourceTable.of(Source(f"s{i}", None) for i in range(100))
    for count in (1, 2, 7):
        for index in range(count):
            shard = Shard(index, count)
            held = shard.of(sources.digests).tolist()
            assert held == [shard.holds(source.source_id) for source in sources]


# Tables of sources --------------------------------------------------------------------------------


anything = st.text(st.characters(exclude_categories=()), max_size=20)
sizes = st.none() | st.integers(0, 2**62)
sources = st.builds(
    Source, anything, st.none() | st.integers(), st.builds(Fingerprint, sizes, sizes)
)


@given(st.lists(sources), st.data())
@example([Source("\ud800", 1), Source("\udc00", 2)], None)
def test_a_table_gives_its_sources_back(given_: list[Source], data: st.DataObject | None) -> None:
    table = SourceTable.of(given_)
    assert list(table) == given_
    assert table == given_
    assert pickle.loads(pickle.dumps(table)) == given_
    assert table.digests.to_bytes() == b"".join(source_digest(s.source_id) for s in given_)
    assert [s.source_id for s in table.trimmed()] == [s.source_id for s in given_]
    if data is not None and given_:
        some = data.draw(st.lists(st.integers(0, len(given_) - 1)))
        part = table.take(np.array(some, np.int64))
        assert list(part) == [given_[i] for i in some]
        assert [s.source_id for s in part.trimmed()] == [given_[i].source_id for i in some]
        assert part.digests.to_bytes() == b"".join(source_digest(given_[i].source_id) for i in some)


def test_files_are_found_by_their_path_and_may_be_called_otherwise() -> None:
    files = SourceTable.of_files(["/data/a", "/data/b/ü"], [1, None], [2, 3])
    assert list(files) == [
        Source("/data/a", "/data/a", Fingerprint(1, 2)),
        Source("/data/b/ü", "/data/b/ü", Fingerprint(None, 3)),
    ]
    inside = files.relative_to("/data/")
    assert [(s.source_id, s.item) for s in inside] == [("a", "/data/a"), ("b/ü", "/data/b/ü")]
    deeper = inside[1:].relative_to("b/")
    assert [(s.source_id, s.item) for s in deeper] == [("ü", "/data/b/ü")]
    assert [s.source_id for s in deeper.trimmed()] == ["ü"]
    assert deeper.digests.to_bytes() == source_digest("ü")


def test_repeated_sources_are_named() -> None:
    with pytest.raises(Exception, match=r"2 sources are named more than once.*: a, c"):
        refuse_repeated(SourceTable.of(Source(name, None) for name in "abcacc"))
    refuse_repeated(SourceTable.of(Source(name, None) for name in "abc"))
