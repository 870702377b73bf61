"""The commands, and the report, where sources are ranges of files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from command import one_line, run

from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.checkpoint.report.facts import facts_of
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Fingerprint, Record, State

RUN, NOW = "0123456789ab", 1.7e9
LOOK = Fingerprint(1_000_000, 1)


def made(
    folder: Path, ids: str, parts: dict[str, State], ends: dict[str, int], not_found: int = 0
) -> Path:
    """Make the checkpoint of a run over parts of files, of 10 rows each.

    Args:
        ends: how many parts files have whose ends were found; ``not_found``: of how many not.
    """
    directory = LocalBackend(folder / "ckpt")
    name = f"{directory.ensure()}-{RUN}-{0:016x}-{1:016x}.parquet"
    (folder / "out").mkdir()
    (folder / "out" / name).write_bytes(b"rows")
    directory.bind(str(folder / "out"), "")
    whole = 10 * list(parts.values()).count(State.COMPLETED)
    records: list[Record] = []
    first = 0
    for part, state in parts.items():
        sequence = len(records) + 1
        if state is State.COMPLETED:
            rows = (FilePart(name, first, 10, whole),)
            first += 10
            record = Record(part, state, sequence, RUN, 10, rows, completed_at=NOW)
        else:
            record = Record(part, state, sequence, RUN, error="ValueError: bad", failed_runs=1)
        records.append(record)
    for end, count in ends.items():
        sequence = len(records) + 1
        records.append(Record(end, State.COMPLETED, sequence, RUN, completed_at=NOW, end=count))
    total = len(parts) + not_found
    writer = WriterFile.create(directory.path, RUN, {"sources_total": total, "ids": ids})
    writer.commit([replace(record, fingerprint=LOOK) for record in records])
    writer.close()
    history = directory.history()
    history.begin(RUN, {"started_at": NOW - 60, "host": "h", "pid": 4})
    slowest = {part: 9.0 - number for number, part in enumerate(parts)}
    ended = {"outcome": "incomplete", "ended_at": NOW, "slowest": slowest}
    history.end(RUN, ended)
    return directory.path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Make a file that is done but for one range, and one whose end is not known."""
    parts = {f"/in/a.tar#rows={n}0-{n + 1}0": State.COMPLETED for n in range(3)}
    parts["/in/a.tar#rows=30-40"] = State.QUARANTINED
    parts["/in/b.tar#rows=0-10"] = State.FAILED
    parts["/in/b.tar#rows=10-20"] = State.COMPLETED
    return made(tmp_path, "rows of 10 rows", parts, {"/in/a.tar#rows=end/10": 4}, not_found=1)


def ids(path: Path, *options: object) -> list[str]:
    found = json.loads(run("sources", path, *options, "--json").stdout)
    return sorted(source["source_id"] for source in found)


def test_row_ranges_are_listed_and_the_ends_of_files_are_not(rows: Path) -> None:
    assert len(ids(rows)) == 6
    assert ids(rows, "--glob", "*a.tar#rows=*") == [
        f"/in/a.tar#rows={n}0-{n + 1}0" for n in range(4)
    ]
    assert ids(rows, "--glob", "*#rows=1?-*") == ["/in/a.tar#rows=10-20", "/in/b.tar#rows=10-20"]
    assert ids(rows, "--glob", "*a.tar*", "--state", "quarantined") == ["/in/a.tar#rows=30-40"]
    assert ids(rows, "--glob", "*end*") == []
    told = one_line(run("reset", rows, "--glob", "*#rows=end/*", "--yes").stderr)
    assert "No source on record" in told
    listed = run("parts", rows, "--glob", "*a.tar*").stdout.splitlines()
    assert [line.rpartition("\t")[2] for line in listed] == ids(
        rows, "--glob", "*a.tar#rows=[012]*"
    )


def test_row_ranges_are_counted_and_reset(rows: Path) -> None:
    def status() -> tuple[int, ...]:
        found = json.loads(run("status", rows, "--json").stdout)
        states = ("total", "completed", "failed", "quarantined")
        return tuple(found[state] for state in states)

    # The end of one file is to be found.
    assert status() == (7, 4, 1, 1)
    assert run("reset", rows, "--glob", "/in/a.tar#rows=[12]0-*", "--yes").returncode == 0
    assert status() == (7, 2, 1, 1)
    assert run("reset", rows, "--state", "quarantined", "--yes").returncode == 0
    assert status() == (7, 2, 1, 0)


@pytest.mark.parametrize(
    ("kind", "part", "size"),
    [
        ("rows of 10 rows", "/in/a.tar#rows=0-10", None),
        ("row_group", "/in/a.parquet#rg3", None),
        ("split of 64 bytes", "/in/a.txt#bytes=64-100", 36),
        ("auto of 64 bytes", "/in/a.txt#bytes=64-100", 36),
        ("auto of 64 bytes", "/in/a.tar#rows=0-10", None),
        ("auto of 64 bytes", "/in/a.tar", 1_000_000),
        ("file", "/in/a.txt#bytes=64-100", 1_000_000),
        ("split relative to source_root of 64 bytes", "#bytes=0-5#bytes=64-100", 36),
    ],
)
def test_a_report_shows_no_part_as_large_as_its_file(
    kind: str, part: str, size: int | None, tmp_path: Path
) -> None:
    path = made(tmp_path, kind, {part: State.COMPLETED}, {})
    facts = facts_of(LocalBackend(path), NOW, lambda sink: [])
    assert [(slow.source_id, slow.size) for slow in facts.slowest] == [(part, size)]
    assert facts.points[-1].sources == 1


def test_a_report_counts_no_ends(rows: Path) -> None:
    facts = facts_of(LocalBackend(rows), NOW, lambda sink: [])
    assert (facts.points[-1].sources, facts.points[-1].rows) == (4, 40)
    assert (facts.status.completed, facts.status.files) == (4, 1)
    assert len(facts.slowest) == 4
