"""Lists of sources, runs, files and parts: one a line, or as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command import run
from local_checkpoint import write
from snapshots import whole_files

import ray_resume
from ray_resume import Checkpoint
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.core.records import Record, State

pytestmark = pytest.mark.long


def test_runs_one_a_line(dead: Path, tmp_path: Path) -> None:
    header, first, second = run("runs", dead).stdout.splitlines()
    assert " ".join(header.split()) == "started outcome took completed failed rows run host error"
    assert first[header.index("outcome") :].split()[0] == "killed"
    end = header.index("rows") + len("rows")
    assert (first[:end].split()[-1], second[:end].split()[-1]) == ("0", "1,234,567")
    at = header.index("outcome")
    assert " ".join(second[at:].split()) == (
        "failed 1 min 0 s 4 0 1,234,567 run3 h\\x1b1 (shard 1 of 2) ValueError: b\\x1bad"
    )
    found = json.loads(run("runs", dead, "--json").stdout)
    assert [one["outcome"] for one in found] == ["killed", "failed"]
    assert found[1]["error"] == "Trace\nValueError: b\x1bad"
    assert found == [vars(one) for one in Checkpoint(dead).runs()]
    LocalBackend(tmp_path / "new").ensure()
    assert run("runs", tmp_path / "new").stdout == "No run is on record.\n"
    assert json.loads(run("runs", tmp_path / "new", "--json").stdout) == []


def test_sources_one_a_line(path: Path) -> None:
    result = run("sources", path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "failed\tf\\n1\tfailed in 1 run\tValueError: bad",
        "failed\tf2\tfailed in 1 run\tValueError: bad",
        "quarantined\tq\tfailed in 3 runs\t\\x1b[31mboom",
        "completed\ta\t10 rows in 1 file",
        "completed\tb\t10 rows in 1 file",
    ]


@pytest.mark.parametrize("state", ["completed", "failed", "quarantined"])
def test_sources_by_state_as_json(path: Path, state: str) -> None:
    result = run("sources", path, "--state", state, "--json")
    sources = json.loads(result.stdout)
    expected = sorted(Checkpoint(path).sources(state), key=lambda source: source.source_id)
    assert [
        ray_resume.SourceRecord(
            **{**s, "files": tuple(s["files"]), "dead_letters": tuple(s["dead_letters"])}
        )
        for s in sources
    ] == expected
    assert len(result.stdout.splitlines()) == len(sources)


def test_no_sources_are_an_empty_array(tmp_path: Path) -> None:
    LocalBackend(tmp_path).ensure()
    assert json.loads(run("sources", tmp_path, "--json").stdout) == []
    assert run("sources", tmp_path).stdout == ""
    assert json.loads(run("files", tmp_path, "--json").stdout) == []


def test_files_one_a_line(path: Path) -> None:
    out = path.parent / "out"
    expected = [f"{out}/a.parquet", f"{out}/b.parquet"]
    assert run("files", path).stdout == "".join(f"{file}\n" for file in expected)
    assert run("files", path, "-0").stdout == "".join(f"{file}\0" for file in expected)
    assert json.loads(run("files", path, "--json").stdout) == expected


def test_parts_one_a_line(shared: Path) -> None:
    out = shared.parent / "out"
    (file,) = out.iterdir()
    assert run("parts", shared).stdout == f"{file}\t0\t2\ta\n{file}\t3\t1\tb\\nb\n"
    assert json.loads(run("parts", shared, "--json").stdout) == [
        {"source_id": "a", "file": str(file), "first_row": 0, "rows": 2},
        {"source_id": "b\nb", "file": str(file), "first_row": 3, "rows": 1},
    ]


def test_a_file_with_dead_rows_is_told_and_tidied(shared: Path) -> None:
    (file,) = (shared.parent / "out").iterdir()
    said = run("status", shared).stdout
    assert "1 file of these also have rows that do not count" in said
    assert f"ray-resume tidy {shared}" in said
    assert run("files", shared).stdout == ""
    assert run("tidy", shared).stdout == "1 file rewritten.\n"
    (new,) = (shared.parent / "out").iterdir()
    assert new != file
    assert run("files", shared).stdout == f"{new}\n"
    assert pq.read_table(new).to_pydict() == {"id": [0, 1, 3]}
    assert run("parts", shared).stdout == f"{new}\t0\t2\ta\n{new}\t2\t1\tb\\nb\n"
    assert run("tidy", shared).stdout == "The output is tidy.\n"
    assert f"ray-resume tidy {shared}" not in run("status", shared).stdout
    assert Checkpoint(shared).check().ok


def test_a_path_of_two_lines_is_refused_but_not_lost(tmp_path: Path) -> None:
    directory = LocalBackend(tmp_path / "ckpt")
    directory.ensure()
    directory.bind("/data/o\nut", "")
    write(
        directory.path, "run1", 1, [Record("a", State.COMPLETED, 1, "run1", parts=whole_files("f"))]
    )
    result = run("files", directory.path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "--null or --json" in result.stderr
    assert run("files", directory.path, "--null").stdout == "/data/o\nut/f\0"
    assert json.loads(run("files", directory.path, "--json").stdout) == ["/data/o\nut/f"]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    directory = LocalBackend(tmp_path / "ckpt")
    directory.ensure()
    directory.bind(f"/data/{name}", "")
    write(
        directory.path,
        "run1",
        1,
        [Record(name, State.COMPLETED, 1, "run1", parts=whole_files("f"))],
    )
    command = [sys.executable, "-m", "ray_resume", "files", str(directory.path)]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"/data/caf\xe9/f\n"
    (source,) = json.loads(run("sources", directory.path, "--json").stdout)
    assert source["source_id"] == name
    assert "caf\\udce9" in run("sources", directory.path).stdout
    assert run("status", directory.path).returncode == 0


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    directory = LocalBackend(tmp_path / "ckpt")
    directory.ensure()
    directory.bind("/data/out", "")
    records = [
        Record(f"s{i}", State.COMPLETED, i + 1, "run1", parts=whole_files(f"{i:0100d}"))
        for i in range(5000)
    ]
    write(directory.path, "run1", 5000, records)
    for command in ("files", "sources"):
        line = f"{sys.executable} -m ray_resume {command} {directory.path} | head -1"
        result = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (result.returncode, result.stderr) == (141, "")
        assert len(result.stdout.splitlines()) == 1
