"""A snapshot: what it counts at once is what its records say one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from any_records import NAMES, RUNS, on_record, records_of_any, usual_file
from hypothesis import given
from hypothesis import strategies as st
from snapshots import snapshot_of, whole_files

from ray_resume.checkpoint.check import _doubtful
from ray_resume.core.digests import Digests, source_digest
from ray_resume.core.output_files import OutputFileSet, listed_files, missing_files
from ray_resume.core.record_log import RecordLog
from ray_resume.core.records import Record, State, encode

pytestmark = [pytest.mark.extended, pytest.mark.long]

USUAL = Record("a", State.COMPLETED, 1, RUNS[0], parts=whole_files(usual_file("a", RUNS[0], 1)))


@given(on_record, st.sets(st.sampled_from(NAMES)), st.data())
def test_what_a_snapshot_counts_at_once_is_what_its_records_say(
    some: tuple[Record, ...], here: set[str], data: st.DataObject
) -> None:
    snapshot = snapshot_of({"x": some[::2], "y": some[1::2]})
    by_id = {record.source_id: record for record in some}
    assert {r.source_id: r for r in snapshot} == by_id
    assert set(listed_files(snapshot)) == {file for record in some for file in record.files}
    assert len(listed_files(snapshot)) == len({file for r in some for file in r.files})
    outside = [r for r in some if r.state is State.COMPLETED and r.source_id not in here]
    wanted = Digests.of(b"".join(map(source_digest, here)))
    count, one = snapshot.completed_outside(wanted)
    assert count == len(outside)
    assert one is None or one in outside
    assert (one is None) == (not outside)
    found = snapshot.find(wanted).tolist()
    rows = dict(zip(here, found, strict=True))
    assert {name for name, row in rows.items() if row >= 0} == here & by_id.keys()
    assert all(snapshot.record(row).source_id == name for name, row in rows.items() if row >= 0)
    assert list(RecordLog(snapshot.blocks())) == list(snapshot)
    every = np.array(data.draw(st.permutations(range(len(snapshot)))), np.int64)
    mixed = every[: len(every) // 2 + 1]
    assert list(snapshot.records(mixed)) == [snapshot.record(row) for row in mixed.tolist()]
    assert snapshot.runs(mixed) == {record.run_id for record in snapshot.records(mixed)}
    states = [State(state) for state in snapshot.column("state", mixed).tolist()]
    assert states == [record.state for record in snapshot.records(mixed)]
    present = OutputFileSet.of(data.draw(st.permutations(sorted(listed_files(snapshot))))[::2])
    missing = dict(missing_files(snapshot.records(mixed), present))
    listed = {file: r.source_id for r in snapshot.records(mixed) for file in r.files}
    assert missing.keys() == listed.keys() - set(present)
    assert all(file in by_id[source_id].files for file, source_id in missing.items())


@given(st.lists(st.lists(records_of_any, max_size=3), max_size=4))
def test_of_several_records_of_a_source_the_newest_counts(runs: list[list[Record]]) -> None:
    """By its number, then by the lowest run id, then the first; whichever file it is in."""
    snapshot = snapshot_of({f"file{n}": some for n, some in enumerate(runs)})
    newest: dict[str, Record] = {}
    for record in (record for some in runs for record in some):
        other = newest.get(record.source_id)
        if other is None or (-record.sequence, record.run_id) < (-other.sequence, other.run_id):
            newest[record.source_id] = record
    assert {r.source_id: r for r in snapshot} == newest
    assert len(snapshot) == len(newest)
    assert snapshot.highest_sequence() == max((r.sequence for r in newest.values()), default=0)
    assert all(snapshot.get(name) == record for name, record in newest.items())


def test_a_usual_record_makes_no_object_to_be_checked() -> None:
    """Else a million records would be looked at one by one."""
    usual = [
        replace(
            USUAL,
            source_id=f"s{i}",
            sequence=i,
            parts=whole_files(usual_file(f"s{i}", RUNS[0], i)),
        )
        for i in range(1, 50)
    ]
    bare = replace(USUAL, run_id=RUNS[1], parts=())
    usual += [replace(bare, source_id=f"t{i}", sequence=i) for i in range(1, 50)]
    log = RecordLog(encode(usual))
    assert len(_doubtful(log, set(RUNS))) == 0
    assert _doubtful(log, {RUNS[0]}).tolist() == list(range(49, 98))
    changes: list[dict[str, Any]] = [
        *({"sequence": 2}, {"sequence": 0}, {"rows": -1}, {"failed_runs": -1}, {"run_id": "x"}),
        *({"parts": whole_files("a", "../b")}, {"parts": whole_files("/a")}),
    ]
    for change in changes:
        odd: list[Any] = [*usual[:9], replace(usual[9], **change)]
        expected = [1, 9] if change == {"sequence": 2} else [9]
        assert _doubtful(RecordLog(encode(odd)), set(RUNS)).tolist() == expected
