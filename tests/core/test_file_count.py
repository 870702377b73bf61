"""How many files a run's rows are in."""

from __future__ import annotations

from ray_resume.core.file_count import count_after, moved_again

RUN, OTHER, TIDY, MERGE = "aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc", "dddddddddddd"


def name(run_id: str, number: int) -> str:
    return f"{'0' * 8}-{run_id}-{0:016x}-{number:016x}.parquet"


def test_files_that_rewrites_put_in_the_place_of_a_run_s_files_are_counted_instead() -> None:
    merged = name(MERGE, 0)
    moved = {name(RUN, number): merged for number in range(3)} | {name(OTHER, 9): merged}
    moved[name(OTHER, 8)] = name(MERGE, 1)
    assert count_after(5, RUN, moved) == 3
    assert count_after(1, "eeeeeeeeeeee", moved) == 1
    assert count_after(5, RUN, {}) == 5


def test_a_file_that_is_rewritten_twice_is_known_by_its_first_name() -> None:
    first = {name(RUN, number): name(TIDY, number) for number in range(3)}
    then = {name(TIDY, 1): name(MERGE, 0), name(TIDY, 2): name(MERGE, 0)}
    assert count_after(3, RUN, moved_again(first, then)) == 2
