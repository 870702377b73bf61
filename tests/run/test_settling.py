"""What becomes of publications that dead runs left on record, without Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ray_resume import Checkpoint
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.contents import Contents
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.console import status_lines
from ray_resume.core.publications import Mark, Publication
from ray_resume.core.records import Record, State, encode
from ray_resume.errors import CheckpointError
from ray_resume.run.settling import settled_contents

pytestmark = pytest.mark.long

DEAD, LIVE, OWN = "d" * 12, "a" * 12, "b" * 12
SINK = "datasink Table rows"


class OtherTable:
    """A table that has some marks."""

    def __init__(self, *marks: Mark, has_marks: bool = True) -> None:
        self.has_marks = has_marks
        self.asked: list[tuple[Mark, str | None]] = []
        self._marks = marks

    def position(self) -> str | None:
        return "18"

    def holds(self, mark: Mark, position: str | None) -> bool:
        raise AssertionError("the dead run could publish after the answer")

    def settle(self, mark: Mark, position: str | None) -> bool:
        self.asked.append((mark, position))
        if position is None:
            raise LookupError("it has forgotten")
        return mark in self._marks

    def publish(
        self, results: Sequence[bytes], rows: int, mark: Mark, check: Callable[[], None]
    ) -> None:
        raise AssertionError


class Place:
    """A checkpoint, in which a run has completed ``a`` and died, or is alive."""

    def __init__(self, path: Path) -> None:
        self.backend = LocalBackend(path)
        self.identity = self.backend.ensure()
        writer = WriterFile.create(path, DEAD, {})
        writer.commit([self.done("a", 1)])
        writer.close()
        self.lease = self.backend.acquire(Owner.here(OWN), Claim(b""), wait_s=0)

    def done(self, source: str, sequence: int, run_id: str = DEAD) -> Record:
        return Record(source, State.COMPLETED, sequence, run_id, rows=5)

    def record(self, *records: Record, number: int = 1, position: str | None = "17") -> None:
        run_id = records[0].run_id
        one = Publication(run_id, number, SINK, position, list(encode(records)))
        self.backend.publications().write(one)

    def settle(self, table: OtherTable | None, sink: str = SINK) -> Contents:
        if not self.lease.path.exists():
            self.lease = self.backend.acquire(Owner.here(OWN), Claim(b""), wait_s=0)
        return settled_contents(self.backend, OWN, self.lease, sink, table)

    def completed(self, contents: Contents) -> list[str]:
        return sorted(r.source_id for r in contents.snapshot if r.state is State.COMPLETED)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "ckpt")


def test_what_has_its_mark_is_committed_as_it_was_recorded(place: Place) -> None:
    records = [place.done("b", 2), place.done("c", 3)]
    place.record(*records)
    mark = Mark(place.identity, DEAD, 1)
    table = OtherTable(mark)
    contents = place.settle(table)
    assert place.completed(contents) == ["a", "b", "c"]
    assert [contents.snapshot.get("b"), contents.snapshot.get("c")] == records
    assert table.asked == [(mark, "17")]
    assert not place.backend.publications().names()
    assert place.completed(place.settle(OtherTable())) == ["a", "b", "c"]
    assert Checkpoint(place.backend.path).check().ok


def test_what_has_none_is_pending(place: Place) -> None:
    place.record(place.done("b", 2))
    table = OtherTable(Mark(place.identity, DEAD, 2), Mark("0" * 8, DEAD, 1))
    assert place.completed(place.settle(table)) == ["a"]
    assert not place.backend.publications().names()


def test_what_was_committed_is_forgotten_without_a_question(place: Place) -> None:
    place.record(place.done("a", 1))
    assert place.completed(place.settle(None, "another sink")) == ["a"]
    assert not place.backend.publications().names()


def test_publications_of_live_runs_are_their_own(place: Place) -> None:
    other = place.backend.acquire(Owner.here(LIVE), Claim(b""), wait_s=0)
    place.record(place.done("b", 2, LIVE))
    table = OtherTable()
    assert place.completed(place.settle(table)) == ["a"]
    assert not table.asked
    assert list(place.backend.publications().names().values()) == [LIVE]
    other.end(wait_s=0)
    place.settle(table)
    assert len(table.asked) == 1


@pytest.mark.parametrize(
    ("table", "sink", "position", "told"),
    [
        (OtherTable(), SINK, None, r"the table cannot tell \(it has forgotten\)"),
        (None, "out/", "17", "this run writes to out/, and does not read that table"),
        (OtherTable(), "datasink Table others", "17", "Run once with the sink of that run"),
    ],
)
def test_nothing_is_guessed(
    place: Place, table: OtherTable | None, sink: str, position: str | None, told: str
) -> None:
    place.record(place.done("b", 2), position=position)
    before = place.backend.publications().names()
    with pytest.raises(CheckpointError, match=told) as raised:
        place.settle(table, sink)
    assert f"remove {place.backend.path}/publications/{DEAD}-000001" in str(raised.value)
    assert place.backend.publications().names() == before
    for name in before:
        Path(place.backend.path, name).unlink()
    assert place.completed(place.settle(table, sink)) == ["a"]


def test_a_table_without_marks_is_told_of(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.record(place.done("b", 2))
    with caplog.at_level(logging.WARNING, "ray_resume"):
        assert place.completed(place.settle(OtherTable(has_marks=False))) == ["a"]
    assert "no place for a mark" in caplog.text
    assert "the rows of b are in the table" in caplog.text


def test_a_damaged_publication_is_an_error_that_names_it(place: Place) -> None:
    place.record(place.done("b", 2))
    (name,) = place.backend.publications().names()
    file = Path(place.backend.path, name)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        place.settle(OtherTable())


def test_what_is_open_is_told_before_a_run_settles_it(place: Place) -> None:
    place.record(place.done("b", 2), place.done("c", 3))
    other = place.backend.acquire(Owner.here(LIVE), Claim(b""), wait_s=0)
    place.record(place.done("d", 4, LIVE))
    checkpoint = Checkpoint(place.backend.path)
    assert checkpoint.status().unsettled == 1
    assert any(
        "1 publication is not confirmed" in line for line in status_lines(checkpoint.status(), "")
    )
    report = checkpoint.check()
    assert report.ok
    assert "A run died while it published 2 sources to" in str(report)
    other.end(wait_s=0)
    name, _ = place.backend.publications().names()
    Path(place.backend.path, name).write_bytes(b"damaged")
    report = checkpoint.check()
    assert not report.ok
    assert f"{name} cannot be read" in str(report)


def test_a_reset_comes_after_open_publications(place: Place) -> None:
    place.lease.end(wait_s=0)
    place.record(place.done("a", 9), place.done("b", 10))
    checkpoint = Checkpoint(place.backend.path)
    assert checkpoint.reset(["a"]) == 1
    contents = place.settle(OtherTable(Mark(place.identity, DEAD, 1)))
    assert place.completed(contents) == ["b"]
    place.record(place.done("c", 12), number=2)
    place.lease.end(wait_s=0)
    checkpoint.reset(state="all")
    assert not place.backend.publications().names()
