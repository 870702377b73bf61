"""Tokens and the accounts of a call, against models in plain Python."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_resume.core.tokens import (
    MODULUS,
    CallAccount,
    SourceArray,
    TokenArray,
    fresh_nonce,
    read_nonce,
    shares,
    sums_by_source,
    token_sum,
    tokens,
)

EDGES = [0, 1, 2**31, 2**32, 2**63 - 1, 2**63, MODULUS - 1]
U64 = st.one_of(st.sampled_from(EDGES), st.integers(0, MODULUS - 1))
SOURCES = st.one_of(
    st.integers(0, 3), st.sampled_from([0, 7, 2**31 - 1]), st.integers(0, 2**31 - 1)
)
ROWS = st.one_of(
    st.lists(st.tuples(SOURCES, U64), max_size=12),
    # One source only: the way that most batches take.
    st.builds(
        lambda source, values: [(source, value) for value in values],
        SOURCES,
        st.lists(U64, max_size=12),
    ),
)
Rows = list[tuple[int, int]]
Deltas = dict[int, int]


@pytest.fixture(autouse=True)
def numpy_warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        yield


def columns(rows: Rows) -> tuple[SourceArray, TokenArray]:
    sources = np.array([source for source, _ in rows], dtype=np.int32)
    return sources, np.array([value for _, value in rows], dtype=np.uint64)


def model_sums(rows: Rows) -> dict[int, int]:
    sums: dict[int, int] = {}
    for source, value in rows:
        sums[source] = (sums.get(source, 0) + value) % MODULUS
    return sums


def check_deltas(deltas: Deltas) -> None:
    for source, delta in deltas.items():
        assert type(source) is int
        assert type(delta) is int
        assert 0 <= delta < MODULUS


def check_preserved(rows: Rows, left: list[tuple[SourceArray, TokenArray]], deltas: Deltas) -> None:
    """What came in == what left in tokens - the (negative) deltas, for each source."""
    check_deltas(deltas)
    out = Counter(dict.fromkeys(model_sums(rows), 0))
    for sources, values in left:
        assert values.dtype == np.uint64
        assert values.shape == sources.shape
        out.update(model_sums(list(zip(sources.tolist(), values.tolist(), strict=True))))
    out.update({source: -delta for source, delta in deltas.items()})
    assert {source: total % MODULUS for source, total in out.items()} == model_sums(rows)


# Tokens ------------------------------------------------------------------------------------------


def splitmix64(seed: int, count: int) -> list[int]:
    """Follow the published C code, statement by statement."""
    out = []
    state = seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % MODULUS
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % MODULUS
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % MODULUS
        out.append(z ^ (z >> 31))
    return out


def test_known_answers() -> None:
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert tokens(0, 0, 3).tolist() == known
    assert splitmix64(0, 3) == known


@given(nonce=U64, start=st.integers(0, 20), count=st.integers(0, 20))
def test_tokens_are_splitmix64(nonce: int, start: int, count: int) -> None:
    out = tokens(nonce, start, count)
    assert out.dtype == np.uint64
    assert out.shape == (count,)
    assert out.tolist() == splitmix64(nonce, start + count)[start:]


@given(nonce=U64, start=st.integers(0, 2**40), sizes=st.lists(st.integers(0, 9), max_size=9))
def test_tokens_do_not_depend_on_batches(nonce: int, start: int, sizes: list[int]) -> None:
    whole = tokens(nonce, start, sum(sizes)).tolist()
    parts: list[int] = []
    for size in sizes:
        parts += tokens(nonce, start + len(parts), size).tolist()
    assert parts == whole


def test_tokens_of_a_source_differ_from_each_other_and_from_other_nonces() -> None:
    drawn = [tokens(nonce, 0, 10_000) for nonce in range(10)]
    assert len(np.unique(np.concatenate(drawn))) == 100_000


def test_read_nonce_is_a_function_of_run_pass_and_source() -> None:
    arguments = [
        ("run", 1, "a"), ("run", 2, "a"), ("run", 1, "b"), ("nur", 1, "a"), ("run", 11, "a"),
        ("run", 1, "1a"), ("run1", 1, "a"), ("run", 1, ""), ("run", 1, "\udcff\0é"),
    ]  # fmt: skip
    nonces = [read_nonce(*each) for each in arguments]
    assert nonces == [read_nonce(*each) for each in arguments]
    assert len(set(nonces)) == len(nonces)
    assert all(type(nonce) is int and 0 <= nonce < MODULUS for nonce in nonces)


def test_read_nonce_is_the_same_in_every_process() -> None:
    # A read that is executed again, on another worker, must agree.
    assert read_nonce("run", 1, "a") == 3321874606642383568


def test_fresh_nonce_heeds_no_seed() -> None:
    drawn = set()
    for _ in range(50):
        random.seed(0)
        np.random.seed(0)
        drawn.add(fresh_nonce())
    assert len(drawn) == 50
    assert all(0 <= nonce < MODULUS for nonce in drawn)
    assert max(drawn) >= 2**60  # all 64 bits are drawn


# Sums and shares ---------------------------------------------------------------------------------


@given(st.lists(U64, max_size=30))
def test_token_sum(values: list[int]) -> None:
    total = token_sum(np.array(values, dtype=np.uint64))
    assert type(total) is int
    assert total == sum(values) % MODULUS


@given(total=U64, count=st.integers(1, 30))
def test_shares_add_up(total: int, count: int) -> None:
    out = shares(total, count)
    assert out.dtype == np.uint64
    assert out.shape == (count,)
    assert token_sum(out) == total


def test_shares_are_drawn_anew_whatever_is_seeded() -> None:
    drawn = []
    for _ in range(20):
        random.seed(0)
        np.random.seed(0)
        drawn.append(shares(1, 5))
    # No share but the only one is ever the same, nor does any part of them add up to the same.
    for size in range(1, 5):
        assert len({token_sum(out[:size]) for out in drawn}) == 20
    assert shares(7, 1).tolist() == [7]


@given(ROWS)
def test_sums_by_source(rows: Rows) -> None:
    sources, values = columns(rows)
    sums = sums_by_source(sources, values)
    assert sums == model_sums(rows)
    check_deltas(sums)


@given(source=SOURCES, values=st.lists(U64, min_size=1, max_size=8))
def test_one_source_takes_both_ways_to_one_sum(source: int, values: list[int]) -> None:
    other = 1 if source == 0 else 0
    alone = [(source, value) for value in values]
    # Another source in the middle: first and last row alike, but the general way is needed.
    between = [*alone, (other, 5), *alone]
    assert sums_by_source(*columns(alone)) == model_sums(alone)
    assert sums_by_source(*columns(between)) == model_sums(between)


# Calls -------------------------------------------------------------------------------------------


@pytest.mark.long
@given(rows=ROWS, data=st.data())
def test_a_call_passes_on_what_came_in(rows: Rows, data: st.DataObject) -> None:
    sources, values = columns(rows)
    before = sources.copy(), values.copy()
    present = sorted(model_sums(rows))
    some = st.lists(st.sampled_from(present), max_size=8) if present else st.just([])
    outputs = [np.array(each, dtype=np.int32) for each in data.draw(st.lists(some, max_size=4))]
    last = np.array(data.draw(some), dtype=np.int32)

    call = CallAccount(sources, values)
    left = [(output, call.emit(output)) for output in outputs]
    out, deltas = call.finish(last)

    check_preserved(rows, [*left, (last, out)], deltas)
    assert set(deltas) == set(present) - set(last.tolist())
    assert np.array_equal(sources, before[0])
    assert np.array_equal(values, before[1])


@pytest.mark.long
@given(rows=ROWS, data=st.data())
def test_keep_passes_on_what_came_in(rows: Rows, data: st.DataObject) -> None:
    sources, values = columns(rows)
    before = values.copy()
    bools = st.one_of(st.booleans(), st.just(False), st.just(True))
    kept = np.array([data.draw(bools) for _ in rows], dtype=np.bool_)

    out, deltas = CallAccount(sources, values).keep(sources, values, kept)

    check_preserved(rows, [(sources[kept], out)], deltas)
    assert set(deltas) == set(sources.tolist()) - set(sources[kept].tolist())
    assert np.array_equal(values, before)
    last = {source: row for row, source in enumerate(sources[kept].tolist())}
    for row, source in enumerate(sources[kept].tolist()):
        if row != last[source]:
            assert out[row] == values[kept][row]  # its own token


@given(ROWS)
def test_keeping_every_row_changes_no_token(rows: Rows) -> None:
    sources, values = columns(rows)
    out, deltas = CallAccount(sources, values).keep(
        sources, values, np.ones(len(rows), dtype=np.bool_)
    )
    assert np.array_equal(out, values)
    assert deltas == {}


def test_keep_by_hand() -> None:
    sources, values = columns([(5, 1), (9, 10), (5, 2), (9, 20), (5, 4), (7, 3)])
    kept = np.array([True, False, True, False, False, False])
    out, deltas = CallAccount(sources, values).keep(sources, values, kept)
    assert out.tolist() == [1, 2 + 4]
    assert deltas == {9: MODULUS - 30, 7: MODULUS - 3}


def test_keep_takes_tokens_that_cannot_be_written_to() -> None:
    # Arrow's are such.
    sources, values = columns([(0, 1), (0, 2)])
    values.flags.writeable = False
    out, _ = CallAccount(sources, values).keep(sources, values, np.array([True, False]))
    assert out.tolist() == [3]


def test_a_single_output_row_carries_the_whole_sum() -> None:
    sources, values = columns([(3, MODULUS - 1), (3, MODULUS - 2)])
    out, deltas = CallAccount(sources, values).finish(sources[:1])
    assert out.tolist() == [MODULUS - 3]
    assert deltas == {}


def test_a_call_without_rows() -> None:
    sources, values = columns([])
    call = CallAccount(sources, values)
    assert call.emit(sources).tolist() == []
    out, deltas = call.finish(sources)
    assert (out.dtype, out.shape, deltas) == (np.dtype(np.uint64), (0,), {})
    out, deltas = CallAccount(sources, values).keep(sources, values, np.array([], dtype=np.bool_))
    assert (out.dtype, out.shape, deltas) == (np.dtype(np.uint64), (0,), {})


def test_what_left_before_is_not_in_the_delta() -> None:
    sources, values = columns([(0, 100), (1, 200)])
    call = CallAccount(sources, values)
    emitted = call.emit(sources[:1])
    out, deltas = call.finish(sources[1:])
    assert out.tolist() == [200]
    assert deltas == {0: (int(emitted[0]) - 100) % MODULUS}


def test_a_sum_of_zero_is_reported_too() -> None:
    # Two tokens can cancel. The ledger adds 0, which does no harm, and completes nothing.
    sources, values = columns([(0, 1), (0, MODULUS - 1)])
    assert CallAccount(sources, values).finish(sources[:0])[1] == {0: 0}


def test_a_source_that_did_not_come_in_cannot_leave() -> None:
    sources, values = columns([(0, 1)])
    with pytest.raises(KeyError):
        CallAccount(sources, values).finish(np.array([1], dtype=np.int32))


def test_two_executions_of_a_call_give_different_shares() -> None:
    """Every proper part of the outputs has another sum in each execution."""
    sources, values = columns([(i % 2, i) for i in range(8)])
    executions = []
    for _ in range(10):
        random.seed(0)
        np.random.seed(0)
        call = CallAccount(sources, values)
        executions.append([*call.emit(sources).tolist(), *call.finish(sources)[0].tolist()])
    for source in (0, 1):
        mine = [out[source::2] for out in executions]
        assert {sum(out) % MODULUS for out in mine} == {sum(values[source::2].tolist())}
        for part in range(1, 2 ** len(mine[0]) - 1):
            sums = {sum(t for j, t in enumerate(out) if part >> j & 1) % MODULUS for out in mine}
            assert len(sums) == len(mine)
