"""Names of output files, in few bytes: a list of them is like a set."""

from __future__ import annotations

from collections import Counter as Counts

import pytest
from any_records import RUNS, usual_file
from hypothesis import given
from hypothesis import strategies as st

from ray_resume.core.filenames import OutputName, stem_of
from ray_resume.core.output_files import OutputFileSet

pytestmark = [pytest.mark.extended, pytest.mark.long]

NAME = usual_file("a", RUNS[0], 1)
TAGGED = f"{stem_of(NAME[:21], None, 'k=1/')}.parquet"
FILES = [
    NAME,
    usual_file("a", RUNS[0], 2),
    usual_file("b", RUNS[0], 1),
    usual_file("b", RUNS[1], 1),
    NAME.replace(".parquet", ".csv"),
    NAME.replace(".parquet", ".json"),
    NAME.replace(".parquet", ".txt"),
    NAME.replace("aaaaaaaa", "bbbbbbbb"),
    NAME.upper(),
    NAME[:-1] + "ü",
    "." + NAME,
    "k=1/" + NAME,
    "k/" + NAME,
    f"k=1/{TAGGED}",
    f"k=2/{TAGGED}",
    f"k=1/k=1/{TAGGED}",
    TAGGED,
    NAME.replace("-", "_"),
    "x" * len(NAME[:-8]) + ".parquet",
    "",
    "other.parquet",
    "\udcff",
]


def test_two_names_are_not_taken_for_two_others() -> None:
    """Put one after the other they are spelt as two names that are not there."""
    for names in ([NAME[:-1], "t" + NAME], [NAME + NAME, ""]):
        assert sorted(OutputFileSet.of(names)) == sorted(names)


@given(st.sets(st.sampled_from(FILES)), st.sets(st.sampled_from(FILES)))
def test_a_list_of_files_is_like_a_set(one: set[str], other: set[str]) -> None:
    mine, theirs = OutputFileSet.of(sorted(one)), OutputFileSet.of(other)
    assert set(mine) == one
    assert len(mine) == len(one)
    assert [name in mine for name in FILES] == [name in one for name in FILES]
    assert set(mine.without(theirs)) == one - other
    for runs in (set[str](), {RUNS[0]}, set(RUNS)):
        for known in (True, False):
            assert set(mine.made_by("a" * 8, runs, known=known)) == {
                name
                for name in one
                if (parsed := OutputName.parse(name)) is not None
                and parsed.checkpoint == "a" * 8
                and (parsed.run_id in runs) == known
                and (parsed.in_place or not known)
            }
    assert set(mine.not_of("a" * 8)) == {
        name
        for name in one
        if (parsed := OutputName.parse(name)) is None
        or parsed.checkpoint != "a" * 8
        or not parsed.in_place
    }
    counts = Counts(
        parsed.checkpoint
        for name in one
        if (parsed := OutputName.parse(name)) is not None and parsed.in_place
    )
    assert mine.checkpoints() == counts


def test_a_compact_name_comes_back() -> None:
    for name in FILES:
        assert list(OutputFileSet.of([name])) == [name]
    assert len(OutputFileSet.of(FILES).compact) == 7
