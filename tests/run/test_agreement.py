"""What sinks agree on, over runs: without Ray, in a folder."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from pyarrow.fs import LocalFileSystem

from ray_resume.checkpoint.output_schemas import SchemaStore
from ray_resume.checkpoint.shared.objects import StoredObjects
from ray_resume.core.variants import MAX_NAMED
from ray_resume.run.agreement import Agreement


def encoded(**kinds: pa.DataType) -> bytes:
    return bytes(pa.schema(list(kinds.items())).serialize().to_pybytes())


def box_in(folder: Path) -> SchemaStore:
    return SchemaStore(StoredObjects(LocalFileSystem(), str(folder), str(folder)))


def test_an_answer_is_durable_and_the_next_run_goes_on_from_it(tmp_path: Path) -> None:
    box = box_in(tmp_path)
    assert box.read() is None
    first = Agreement(box, "a", lambda source: f"/in/{source}")
    assert first.widen([(encoded(x=pa.int8()), 0)], False) == (encoded(x=pa.int8()), None)
    stored = box.read()
    assert stored is not None
    assert not stored.stale
    second = Agreement(box, "b", lambda source: f"/in/{source}")
    answer, problem = second.widen([(encoded(x=pa.null(), y=pa.string()), 1)], False)
    assert (answer, problem) == (encoded(x=pa.int8(), y=pa.string()), None)
    stored = box.read()
    assert stored is not None
    assert stored.stale
    _, problem = second.widen([(encoded(x=pa.string()), 2)], False)
    assert problem is not None
    assert "/in/0" in problem
    assert "/in/2" in problem
    # What is refused changes nothing.
    assert second.widen([(encoded(x=pa.int8()), 3)], False) == (answer, None)


def test_where_no_output_stays_its_types_bind_nobody(tmp_path: Path) -> None:
    box = box_in(tmp_path)
    Agreement(box, "a", str).widen([(encoded(x=pa.string(), gone=pa.int8()), 0)], False)
    for stale in (False, True):
        fresh = Agreement(box, f"b{stale}", str, afresh=True, stale=stale)
        assert fresh.widen([(encoded(x=pa.int8()), 0)], False) == (encoded(x=pa.int8()), None)
        stored = box.read()
        assert stored is not None
        assert (stored.schema.names, stored.stale) == (["x"], stale)


def test_a_schema_of_the_users_takes_the_place_of_what_was_agreed(tmp_path: Path) -> None:
    box = box_in(tmp_path)
    Agreement(box, "a", str).widen([(encoded(x=pa.string()), 0)], False)
    given = Agreement(box, "b", str)
    assert given.widen([(encoded(x=pa.int8()), 0)], True) == (encoded(x=pa.int8()), None)
    stored = box.read()
    assert stored is not None
    assert stored.given
    assert stored.stale
    assert stored.schema.field("x").type == pa.int8()


def test_types_of_sources_that_are_gone_bind_nobody(tmp_path: Path) -> None:
    box = box_in(tmp_path)
    first = Agreement(box, "a", lambda source: f"/in/{source}")
    first.widen([(encoded(x=pa.int8()), 0), (encoded(x=pa.float64(), y=pa.int8()), 1)], False)
    # A run that was at work beside it has agreed on what does not go with that.
    Agreement(box_in(tmp_path / "other"), "b", lambda source: f"/in/{source}").widen(
        [(encoded(y=pa.string()), 2)], False
    )
    (tmp_path / "other/schemas/b.json").rename(tmp_path / "schemas/b.json")
    assert box.sources() == {f"/in/{source}" for source in range(3)}
    _, problem = Agreement(box, "c", str).widen([(encoded(x=pa.int8()), 3)], False)
    assert problem is not None
    assert "/in/1" in problem
    assert "/in/2" in problem
    later = Agreement(box, "d", lambda source: f"/in/{source}", gone={"/in/1"})
    wanted = encoded(x=pa.int16(), y=pa.string())
    assert later.widen([(encoded(x=pa.int16()), 3)], False) == (wanted, None)
    # The next run knows nothing else.
    stored = box.read()
    assert stored is not None
    assert stored.stale
    assert stored.sources == {"/in/0", "/in/2", "/in/3"}
    assert len(box.names()) == 1


def test_what_a_complete_source_asks_for_binds_for_ever(tmp_path: Path) -> None:
    box = box_in(tmp_path)
    Agreement(box, "a", lambda _: None).widen([(encoded(x=pa.int8()), 0)], False)
    stored = box.read()
    assert stored is not None
    assert stored.without({"0", "/in/0"}) == stored
    assert box.sources() == set()


def test_only_so_many_sources_are_kept_of_a_schema(tmp_path: Path) -> None:
    box = box_in(tmp_path)
    run = Agreement(box, "a", str)
    for source in range(2 * MAX_NAMED):
        run.widen([(encoded(x=pa.int8()), source)], False)
        if source == MAX_NAMED:
            written = (tmp_path / "schemas/a.json").stat().st_mtime_ns
    assert (tmp_path / "schemas/a.json").stat().st_mtime_ns == written
    assert len(box.sources()) == MAX_NAMED
