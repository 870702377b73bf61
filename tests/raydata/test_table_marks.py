"""Marks in real tables of Lance, Iceberg and Delta: put there, found, and out of sight."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from ray.data.datasource import WriteResult
from table_driver import KINDS, SCHEMA, catalog, datasink, ids_in_table, skip_if_not_installed

from ray_resume.core.publications import Mark
from ray_resume.errors import CheckpointError
from ray_resume.raydata.interception import intercepted
from ray_resume.raydata.table_marks import TableMarks, marks_of

pytestmark = [pytest.mark.extended, pytest.mark.long]

MARK = Mark("c0ffee00", "0123456789ab", 1)
OTHER_RUN = Mark("c0ffee00", "ba9876543210", 1)


def alive() -> None:
    """Stand for a check of the lease that finds it held."""


def written(sink: Any, *ids: int) -> WriteResult[Any]:
    """Write rows as a worker does; what the driver gets of them."""
    sink = copy.copy(sink)
    sink.on_write_start(SCHEMA)
    rows = pa.table([ids, [f"row {i}" for i in ids], [i / 7 for i in ids]], schema=SCHEMA)
    context = SimpleNamespace(task_idx=0, kwargs={"write_uuid": f"{min(ids):032x}"})
    return WriteResult(len(ids), 0, [sink.write(iter([rows]), context)])


def marks_in(kind: str, folder: Path) -> TableMarks:
    marks = marks_of(datasink(kind, folder))
    assert marks is not None
    return marks


@pytest.fixture(params=[kind for kind in KINDS if kind != "upsert"])
def kind(request: pytest.FixtureRequest) -> str:
    skip_if_not_installed(request.param)
    return str(request.param)


def test_a_mark_is_there_from_its_publication_on(kind: str, tmp_path: Path) -> None:
    sink = datasink(kind, tmp_path)
    marks = marks_of(sink)
    assert marks is not None
    before = marks.position()
    assert not marks.holds(MARK, before)
    marks.publish(written(sink, 1, 2), MARK, alive)
    assert ids_in_table(kind, tmp_path) == [1, 2]
    assert marks_in(kind, tmp_path).holds(MARK, before)
    assert not marks.holds(OTHER_RUN, before)
    second = MARK._replace(number=2)
    between = marks.position()
    assert not marks.holds(second, between)
    # Another run publishes at the same time, and so does somebody else.
    others = datasink(kind, tmp_path)
    other_marks = marks_of(others)
    assert other_marks is not None
    rows = written(sink, 3), written(others, 4), written(others, 5)
    other_marks.publish(rows[1], OTHER_RUN, alive)
    plain = copy.copy(others)
    plain.on_write_start(None)
    plain.on_write_complete(rows[2])
    marks.publish(rows[0], second, alive)
    assert ids_in_table(kind, tmp_path) == [1, 2, 3, 4, 5]
    assert marks_in(kind, tmp_path).holds(second, between)
    assert marks.holds(OTHER_RUN, between)


def test_two_publish_at_once(kind: str, tmp_path: Path) -> None:
    datasink(kind, tmp_path)
    if kind == "delta":
        marks_in(kind, tmp_path).publish(written(datasink(kind, tmp_path), 0), MARK, alive)
    sinks = [datasink(kind, tmp_path) for _ in range(3)]
    runs = [[written(sink, 10 * i + j) for j in range(1, 4)] for i, sink in enumerate(sinks, 1)]
    errors: list[BaseException] = []

    def publish(number: int) -> None:
        try:
            marks = marks_of(sinks[number])
            assert marks is not None
            for j, result in enumerate(runs[number]):
                marks.publish(result, Mark("c", f"{number:012x}", j), alive)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=publish, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    once = [10 * i + j for i in range(1, 4) for j in range(1, 4)]
    assert ids_in_table(kind, tmp_path) == ([0] if kind == "delta" else []) + once


def forget_iceberg(folder: Path) -> None:
    table = catalog(folder).load_table("shop.rows")
    table.append(SCHEMA.empty_table())
    table = catalog(folder).load_table("shop.rows")
    doomed = [one.snapshot_id for one in table.snapshots()][:-1]
    table.maintenance.expire_snapshots().by_ids(doomed).commit()


def forget_lance(folder: Path) -> None:
    import lance

    lance.write_dataset(SCHEMA.empty_table(), str(folder / "table"), mode="append")
    lance.dataset(str(folder / "table")).cleanup_old_versions(older_than=timedelta(0))


def forget_delta(folder: Path) -> None:
    from deltalake import DeltaTable

    table = DeltaTable(str(folder / "table"))
    table.alter.set_table_properties({"delta.setTransactionRetentionDuration": "interval 1 days"})


FORGET: dict[str, Callable[[Path], None]] = {
    "iceberg": forget_iceberg,
    "lance": forget_lance,
    "lance_ray": forget_lance,
    "delta": forget_delta,
}


def test_a_table_that_has_forgotten_cannot_tell(kind: str, tmp_path: Path) -> None:
    sink = datasink(kind, tmp_path)
    marks = marks_of(sink)
    assert marks is not None
    marks.publish(written(sink, 1), MARK, alive)
    before = marks.position()
    marks.publish(written(sink, 2), OTHER_RUN, alive)
    FORGET[kind](tmp_path)
    with pytest.raises(LookupError):
        marks.holds(MARK._replace(number=2), before)


def test_a_snapshot_that_was_rolled_back_does_not_count(tmp_path: Path) -> None:
    skip_if_not_installed("iceberg")
    sink = datasink("iceberg", tmp_path)
    marks = marks_of(sink)
    assert marks is not None
    before = marks.position()
    assert before is not None
    marks.publish(written(sink, 1), MARK, alive)
    catalog(tmp_path).load_table("shop.rows").manage_snapshots().set_current_snapshot(
        int(before)
    ).commit()
    assert ids_in_table("iceberg", tmp_path) == []
    assert not marks.holds(MARK, before)


def test_a_delta_table_that_is_gone_cannot_tell(tmp_path: Path) -> None:
    skip_if_not_installed("delta")
    marks = marks_in("delta", tmp_path)
    assert marks.position() is None
    assert not marks.holds(MARK, None), "there was none, and there is none"
    with pytest.raises(LookupError, match="no table any more"):
        marks.holds(MARK, "3")


@pytest.mark.parametrize("moment", ["before it begins", "as it commits"])
def test_a_run_that_wakes_after_it_was_declared_dead_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    skip_if_not_installed("delta")
    from deltalake import DeltaTable

    sink = datasink("delta", tmp_path)
    marks = marks_in("delta", tmp_path)
    marks.publish(written(sink, 1), MARK, alive)
    asleep, before = MARK._replace(number=2), marks.position()
    rows = written(sink, 2)

    answers: list[bool] = []

    def declare_dead() -> None:
        # As another process would: the commits of this thread are intercepted.
        thread = threading.Thread(
            target=lambda: answers.append(marks_in("delta", tmp_path).settle(asleep, before))
        )
        thread.start()
        thread.join()
        assert not answers.pop()

    if moment == "before it begins":
        declare_dead()
    else:
        seen: list[int | None] = []
        version_of = DeltaTable.transaction_version

        def declare_dead_after(table: DeltaTable, application: str) -> int | None:
            seen.append(version_of(table, application))
            if len(seen) == 1 and threading.current_thread() is threading.main_thread():
                declare_dead()
            return seen[0] if len(seen) == 1 else version_of(table, application)

        monkeypatch.setattr(DeltaTable, "transaction_version", declare_dead_after)
    with pytest.raises(CheckpointError, match=r"was declared dead.*Run again"):
        marks.publish(rows, asleep, alive)
    assert ids_in_table("delta", tmp_path) == [1]

    # Another run asks once more, since the one that did was killed, and publishes the rows.
    declare_dead()
    others = marks_in("delta", tmp_path)
    others.publish(written(sink, 3), OTHER_RUN, alive)
    assert ids_in_table("delta", tmp_path) == [1, 3]
    assert others.settle(OTHER_RUN, before)
    others.publish(written(sink, 4), OTHER_RUN._replace(number=2), alive)
    assert ids_in_table("delta", tmp_path) == [1, 3, 4]


@pytest.mark.parametrize("table", ["iceberg", "iceberg, empty", "upsert", "delta", "delta, new"])
def test_a_driver_that_stands_still_after_its_check_publishes_nothing(
    tmp_path: Path, table: str
) -> None:
    kind, _, state = table.partition(", ")
    skip_if_not_installed(kind)
    sink = datasink(kind, tmp_path)
    ids = []
    if state == "empty":
        catalog(tmp_path).drop_table("shop.rows")
        catalog(tmp_path).create_table("shop.rows", SCHEMA)
    elif not state:
        marks_in(kind, tmp_path).publish(written(sink, 1), MARK, alive)
        ids = [1]
    marks = marks_of(sink)
    assert marks is not None
    asleep, before = MARK._replace(number=2), marks.position()
    answers: list[bool] = []

    def declare_dead() -> None:
        successor = marks_of(datasink(kind, tmp_path) if state != "empty" else sink)
        assert successor is not None
        answers.append(successor.settle(asleep, before))

    def check() -> None:
        if answers:
            raise CheckpointError("the lease is lost")
        # Another process declares this one dead after it has passed its check.
        thread = threading.Thread(target=declare_dead)
        thread.start()
        thread.join()

    with pytest.raises(CheckpointError, match=r"the lease is lost|was declared dead"):
        marks.publish(written(sink, 2), asleep, check)
    assert answers == [False]
    assert ids_in_table(kind, tmp_path) == ids
    # It knows so if it asks itself, and the successor publishes these rows.
    assert not marks.holds(asleep, before)
    marks_in(kind, tmp_path).publish(written(sink, 3), OTHER_RUN, alive)
    assert ids_in_table(kind, tmp_path) == [*ids, 3]


def test_a_datasink_without_a_place_for_marks() -> None:
    from ray.data.datasource import Datasink

    class Other(Datasink[None]):
        def write(self, blocks: Any, ctx: Any) -> None: ...

    assert marks_of(Other()) is None


def test_only_this_threads_calls_are_intercepted() -> None:
    class Library:
        @staticmethod
        def double(number: int) -> int:
            return 2 * number

        def triple(self, number: int) -> int:
            return 3 * number

    before = dict(vars(Library))
    seen = []

    def other() -> None:
        seen.append((Library.double(1), Library().triple(1)))

    with (
        intercepted(Library, "double", lambda original, number: original(number) + 100),
        intercepted(Library, "triple", lambda original, it, number: original(it, number) + 100),
    ):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        other()
    other()
    assert seen == [(2, 3), (102, 103), (2, 3)]
    assert dict(vars(Library)) == before
