"""`ray-resume status`: counts, runs, errors, and which commands to type next."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from command import run
from local_checkpoint import write

import ray_resume
from ray_resume import Checkpoint
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.core.records import Record, State

pytestmark = pytest.mark.long


def test_status_tells_a_dead_jobs_story(path: Path) -> None:
    lease = Lease.acquire(
        path, Owner("run2", "node-7", 4711, time.time() - 90), Claim(None), wait_s=0
    )
    lease.release()
    result = run("status", path)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "2 of 6 sources completed (33.3 %), 1 pending, 2 failed, 1 quarantined"
    assert lines[1] == f"[{'#' * 13}{'q' * 6}{'!' * 13}{'.' * 8}]"
    assert lines[2] == f"Output: 20 rows in 2 files, {path.parent / 'out'}"
    assert re.match(r"Last commit: 2 h \d+ min ago, 20", lines[3])
    killed = r"Killed: run run2 \(host node-7, pid 4711\), started [1-9] min \d+ s ago"
    assert re.match(killed, lines[4])
    assert lines[5:10] == [
        "No run is at work.",
        "Most common errors:",
        "  2 x ValueError: bad",
        "  1 x \\x1b[31mboom",
        "Next:",
    ]
    commands = [line.split("#")[0].strip() for line in lines[10:]]
    assert commands == [
        "your script once more",
        f"ray-resume sources {path} --state failed",
        f"ray-resume reset {path} --state quarantined",
        f"ray-resume check {path}",
    ]
    assert "it goes on with 3 sources" in lines[10]


def test_status_of_a_finished_job(path: Path) -> None:
    write(
        path, "run3", 5, [Record(s, State.COMPLETED, 9, "run3") for s in ("f\n1", "f2", "q", "x")]
    )
    lines = run("status", path).stdout.splitlines()
    assert lines[0] == "6 of 6 sources completed (100.0 %)"
    assert lines[-1].split("#")[0].strip() == f"ray-resume files {path}"


def test_an_incomplete_job_is_told_by_the_exit_code(path: Path, tmp_path: Path) -> None:
    def code(*options: str) -> int:
        return run("status", path, *options).returncode

    assert (code(), code("--fail-if-incomplete"), code("--fail-if-incomplete", "--json")) == (
        0,
        3,
        3,
    )
    sources = ("f\n1", "f2", "q")
    write(path, "run3", 5, [Record(s, State.COMPLETED, 9, "run3") for s in sources])
    assert code("--fail-if-incomplete") == 3  # One of six was never read.
    write(path, "run4", 5, [Record("x", State.COMPLETED, 10, "run4")])
    assert code("--fail-if-incomplete", "--watch") == 0
    LocalBackend(tmp_path / "new").ensure()
    assert run("status", tmp_path / "new", "--fail-if-incomplete").returncode == 3


def test_status_before_the_first_run(tmp_path: Path) -> None:
    LocalBackend(tmp_path).ensure()
    result = run("status", tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith("0 of 0 sources completed\n")
    assert "nothing was run yet" in result.stdout


def test_status_of_a_live_run(path: Path) -> None:
    lease = Lease.acquire(path, Owner.here("run3"), Claim(None), wait_s=0)
    lines = run("status", path).stdout.splitlines()
    assert any(line.startswith("At work: run run3 (host ") for line in lines)
    assert "No run is at work." not in lines
    assert f"  ray-resume status {path} --watch" in [
        line.split("  #")[0].rstrip() for line in lines
    ]
    assert not any("your script" in line or "reset" in line for line in lines)
    lease.end(wait_s=0)


def test_the_pace_of_a_live_run(path: Path) -> None:
    owner = Owner("run3", "here", 1, time.time() - 60)
    lease = Lease.acquire(path, owner, Claim(None), wait_s=0)
    assert "Pace: no source was completed lately\n" in run("status", path).stdout
    now = time.time()
    done = [Record(f"n{n}", State.COMPLETED, 9 + n, "run3", completed_at=now) for n in range(2)]
    write(path, "run3", 8, done)
    history = LocalBackend(path).history()
    history.begin("run3", {"started_at": owner.started_at})
    history.sign("run3", {"at": now, "rows_at_risk": 4321})
    (line,) = (line for line in run("status", path).stdout.splitlines() if "Pace" in line)
    # Two in a minute, three to do.
    told = r"Pace: 2\.0 sources a minute, about 1 min 3\d s left, 4,321 rows at risk"
    assert re.fullmatch(told, line)
    lease.end(wait_s=0)
    assert "Pace" not in run("status", path).stdout


def test_status_as_json_has_every_documented_field(path: Path) -> None:
    result = run("status", path, "--json")
    assert (result.returncode, result.stderr) == (0, "")
    status = json.loads(result.stdout)
    assert status == dict(Checkpoint(path).status())
    assert {"total", "completed", "failed", "quarantined", "pending", "writers"} <= set(status)
    guide = Path(ray_resume.__file__).parents[1] / "examples" / "inspect_and_steer.md"
    text = guide.read_text()
    assert [name for name in status if f"`{name}`" not in text] == []


def test_paths_can_be_typed_as_they_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "a dir;with"
    LocalBackend(path).ensure()
    write(path, "run1", 1, [Record("f", State.FAILED, 1, "run1", error="e")])
    assert f"ray-resume sources '{path}' --state failed" in run("status", path).stdout


def test_dead_letters_are_not_all_is_done(dead: Path) -> None:
    lines = run("status", dead).stdout.splitlines()
    assert lines[:2] == ["6 of 6 sources completed (100.0 %)", f"[{'#' * 40}]"]
    assert "1,235 rows are in dead letters, of 2 sources" in lines
    steps = [line.split("#")[0].strip() for line in lines[lines.index("Next:") + 1 :]]
    assert steps == [
        f"ray-resume sources {dead} --dead-letters",
        f"ray-resume reset {dead} --dead-letters",
    ]
    assert run("sources", dead).stdout.splitlines()[:2] == [
        "completed\tf\\n1\t1 row in 1 file\t1 row in dead letters",
        "completed\tx\t1 row in 1 file\t1,234 rows in dead letters",
    ]
    assert len(run("sources", dead, "--dead-letters").stdout.splitlines()) == 2
    found = json.loads(run("sources", dead, "--dead-letters", "--json").stdout)
    assert [source["rows_dead_lettered"] for source in found] == [1, 1234]
    refused = run("reset", dead, "--dead-letters")
    assert (refused.returncode, "2 sources with dead letters" in refused.stderr) == (2, True)
    assert run("reset", dead, "--dead-letters", "--yes").stdout.startswith("2 sources forgotten.")
    said = run("status", dead).stdout
    assert "dead letters" not in said
    assert "it goes on with 2 sources" in said


def test_status_tells_how_the_last_run_ended(dead: Path) -> None:
    (line,) = (line for line in run("status", dead).stdout.splitlines() if "Last run" in line)
    assert re.match(r"Last run: failed (\d min )?\d+ s ago, 20", line)
    assert line.endswith(", after 1 min 0 s: ValueError: b\\x1bad")


def test_a_listed_file_that_is_gone_is_told(path: Path) -> None:
    assert "gone" not in run("status", path).stdout
    (path.parent / "out" / "b.parquet").unlink()
    said = run("status", path).stdout
    assert "1 listed file is gone from that folder" in said
    assert f"ray-resume check {path}" in said
    assert json.loads(run("status", path, "--json").stdout)["files_missing"] == 1
