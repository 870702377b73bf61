"""Which ranges of rows are known of a file, by ids of any kind on record."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ray_resume.core.record_log import RecordLog
from ray_resume.core.records import Fingerprint, Record, State, encode
from ray_resume.core.row_ranges import end_id, file_ends, known_ranges, lacking_ranges, range_id
from ray_resume.core.snapshot import Snapshot
from ray_resume.core.sources import SourceTable

# It needs none of the libraries whose oldest versions are tested.
pytestmark = pytest.mark.long

FILES = ["/in/a.tar", "/in/a.tar#rows=0-10", "", "/in/\udcff", "/in/ü-1"]
LOOK = Fingerprint(5, 5)
NUMBER = "0|[1-9][0-9]{0,17}"
pieces = st.sampled_from(
    [*FILES, "#rows=", "#", "rows=", "-", "0", "10", "20", "30", "9" * 18, "1" * 19, "end/", "٣"]
)
one_of_any = st.lists(pieces, max_size=6).map("".join)
# Nearly ids of ranges, and some that are.
marks = st.sampled_from(["#rows=", "#rows=", "#bytes", "#Rows=", "rows=0"])
bounds = st.sampled_from(
    ["0-10", "5-15", "010-020", "0-20", "10-", "-10", "10:20", "1" + "0" * 17 + "-1" + "0" * 18]
) | st.just("1" + "0" * 17 + "-1" + "0" * 16 + "10")
one_like_ours = st.builds("{}{}{}".format, st.sampled_from(FILES), marks, bounds)
one_of_ours = st.builds(range_id, st.sampled_from(FILES), st.integers(0, 5), st.just(10))


def snapshot_of(ids: list[str], ends: dict[str, int]) -> Snapshot:
    records = [
        Record(one, State.COMPLETED, number, "run", fingerprint=LOOK)
        for number, one in enumerate(ids, 1)
    ]
    for file, count in ends.items():
        sequence = len(records) + 1
        end = end_id(file, 10)
        records.append(Record(end, State.COMPLETED, sequence, "run", fingerprint=LOOK, end=count))
    return Snapshot({"run": RecordLog(encode(records))})


@settings(max_examples=300)
@given(
    st.lists(one_of_any | one_like_ours | one_of_ours, max_size=40, unique=True),
    st.dictionaries(st.sampled_from(FILES), st.integers(1, 4)),
)
@example(["/in/a.tar#rows=10-20", "/in/a.tar#rows=010-020"], {"/in/a.tar": 2})
def test_ranges_on_record_are_known_whatever_else_is(ids: list[str], ends: dict[str, int]) -> None:
    files = SourceTable.of_files(FILES, [5] * len(FILES), [5] * len(FILES))
    snapshot = snapshot_of(ids, ends)
    found = known_ranges(file_ends(files, 10), snapshot, 10)
    expected, lacking = set(), 0
    there: dict[str, set[tuple[int, int]]] = {}
    for one in ids:
        match = re.fullmatch(f"(.*)#rows=({NUMBER})-({NUMBER})", one, re.DOTALL)
        if match is None:
            continue
        first, stop = int(match[2]), int(match[3])
        there.setdefault(match[1], set()).add((first, stop))
        if match[1] in FILES and first % 10 == 0 and stop == first + 10:
            expected.add((one, match[1], first // 10))
    for file, count in ends.items():
        ours = (one for one in there.get(file, ()) if one[0] % 10 == 0 and one[1] == one[0] + 10)
        have = {first // 10 for first, _ in ours}
        for number in set(range(count)) - have:
            expected.add((range_id(file, number, 10), file, number))
        lacking += max(0, count - len(there.get(file, ())))
    assert {(source.source_id, *source.item) for source in found} == expected
    assert lacking_ranges(snapshot) == lacking
