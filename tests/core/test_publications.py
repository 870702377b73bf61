"""Publications: how they are kept, what is left of them, and any history of runs and crashes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from publication_simulator import SHIPPED, Rules, simulate_publications
from snapshots import snapshot_of

from ray_resume.core.messages import Completion
from ray_resume.core.publications import Mark, Publication, PublicationQueue, unsettled
from ray_resume.core.records import Record, State, encode
from ray_resume.errors import CheckpointError

RUN = "0123456789ab"

pytestmark = pytest.mark.long


def done(source: str, sequence: int, run_id: str = RUN) -> Record:
    return Record(source, State.COMPLETED, sequence, run_id, rows=sequence)


def publication(*records: Record) -> Publication:
    return Publication(RUN, 3, "datasink Table", "17", list(encode(records)))


def test_a_publication_is_read_as_it_was_written() -> None:
    for position in ("17", None):
        one = Publication(RUN, 3, "datasink ü", position, list(encode([done("a", 1)])))
        assert Publication.from_bytes(one.to_bytes()) == one
    assert str(Mark("c0ffee00", RUN, 3)) == f"c0ffee00-{RUN}-3"


@given(st.data())
def test_a_damaged_publication_is_refused(data: st.DataObject) -> None:
    whole = publication(done("a", 1), done("b", 2)).to_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    change = data.draw(st.integers(1, 255))
    damaged = whole[:at] if cut else whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :]
    try:
        read = Publication.from_bytes(damaged)
    except (ValueError, CheckpointError):
        return
    # The records have a checksum. The text beside them may be another.
    assert read.blocks == Publication.from_bytes(whole).blocks


def test_what_no_record_supersedes_is_left_as_it_is() -> None:
    one = publication(done("a", 5), done("b", 6), done("c", 7))
    assert list(unsettled(one, snapshot_of({}))) == [done("a", 5), done("b", 6), done("c", 7)]
    earlier = Record("a", State.FAILED, 4, RUN)
    reset = Record("b", State.RESET, 8, "f" * 12)
    snapshot = snapshot_of({RUN: [earlier, done("c", 7)], "f" * 12: [reset]})
    assert list(unsettled(one, snapshot)) == [done("a", 5)]
    committed = snapshot_of({RUN: [done("a", 5), done("b", 6), done("c", 7)]})
    assert len(unsettled(one, committed)) == 0


def test_one_publication_at_a_time() -> None:
    queue = PublicationQueue()
    assert queue.take() is None
    first, second, third = (Completion(i, 1, 1, (), (b"result",)) for i in range(3))
    nothing = Completion(3, 1, 0)
    assert queue.add([first, nothing]) == [nothing]
    taken = queue.take()
    assert taken is not None
    assert (taken.results, taken.rows) == ([b"result"], 1)
    assert taken == (1, [first], False)
    queue.add([second])
    assert queue.take() == (1, [first], True), "it is open until it is confirmed"
    with pytest.raises(ValueError, match="not the open one"):
        queue.confirm(2)
    assert queue.confirm(1).completions == [first]
    assert queue.take() == (2, [second], False)
    queue.put_back()
    queue.add([third])
    # Its number may be on record although recording it raised.
    assert queue.take() == (3, [second, third], False)


def run_histories(seeds: range) -> Counter[str]:
    total: Counter[str] = Counter()
    for seed in seeds:
        wrong, seen = simulate_publications(seed)
        assert not wrong, f"simulate_publications({seed}): {wrong}"
        total += seen
    return total


def test_each_row_is_in_the_table_once_after_any_history() -> None:
    seen = run_histories(range(400))
    kinds = ("published", "settled", "forgotten", "killed", "reset", "interrupted")
    assert min(seen[kind] for kind in kinds) > 20, seen


@pytest.mark.slow
def test_many_histories_of_publications() -> None:
    run_histories(range(100_000))


# A broken rule, and a seed shortly before the first history that shows it.
BROKEN = [
    (Rules(records=False), 0),
    (Rules(looks=False), 0),
    (Rules(settles=False), 0),
    (Rules(spares_live=False), 0),
    (Rules(commits_first=False), 0),
    (Rules(keeps_numbers=False), 8600),
    (Rules(asks_again=False), 0),
]


@pytest.mark.parametrize(("rules", "seed"), BROKEN, ids=str)
def test_the_simulator_finds_a_broken_rule(rules: Rules, seed: int) -> None:
    assert rules != SHIPPED
    assert any(simulate_publications(seed + number, rules)[0] for number in range(600))
