"""Claims: when two runs have a source in common, and what becomes of damaged ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_resume.checkpoint import claims as claims_module
from ray_resume.checkpoint.claims import Claim
from ray_resume.core.digests import source_digest
from ray_resume.errors import CheckpointError

EVERYTHING = Claim(None)

digests = st.sets(st.integers(0, 40).map(lambda n: source_digest(f"s{n}")))


@given(digests, digests)
def test_claims_meet_where_they_have_a_source_in_common(one: set[bytes], other: set[bytes]) -> None:
    mine, theirs = Claim(frozenset(one)), Claim(b"".join(sorted(other)))
    assert mine.overlaps(theirs) == theirs.overlaps(mine) == bool(one & other)
    assert EVERYTHING.overlaps(mine)
    assert mine.overlaps(EVERYTHING)


@pytest.mark.parametrize("few", [0, 1 << 20])
def test_large_claims_are_compared_as_columns(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    monkeypatch.setattr(claims_module, "_SMALL_CLAIM", few)
    claims = [
        Claim(frozenset(source_digest(f"s{n}") for n in range(k, k + 10))) for k in range(0, 30, 5)
    ]
    for i, one in enumerate(claims):
        for j, other in enumerate(claims):
            assert one.overlaps(other) == (abs(i - j) < 2)


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_shards_that_share_no_number_do_not_meet(n: int, m: int, data: st.DataObject) -> None:
    i, j = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, m - 1))
    # As if they had a source in common: what decides is whether any number is in both.
    same = frozenset([source_digest("a")])
    meet = any(k % n == i and k % m == j for k in range(n * m))
    assert Claim(same, (i, n)).overlaps(Claim(same, (j, m))) == meet
    assert Claim(same, (i, n)).overlaps(Claim(same))
    assert Claim(None, (i, n)).overlaps(Claim(same, (j, m))) == meet


@given(st.none() | digests, st.none() | st.tuples(st.just(1), st.integers(2, 9)))
def test_a_claim_comes_back_from_its_bytes(
    sources: set[bytes] | None, shard: tuple[int, int] | None
) -> None:
    one = Claim(None if sources is None else frozenset(sources), shard)
    assert Claim.from_bytes(one.to_bytes()) == one


@given(st.integers(0, 200), st.binary(max_size=3))
def test_a_damaged_claim_is_refused(at: int, instead: bytes) -> None:
    sound = Claim(frozenset(source_digest(f"s{n}") for n in range(8)), (1, 3)).to_bytes()
    damaged = sound[:at] + instead + sound[at + 1 :]
    try:
        read = Claim.from_bytes(damaged)
    except CheckpointError:
        return
    # Its first line may be spelt otherwise, with a space more perhaps, and say the same.
    assert read == Claim.from_bytes(sound)
