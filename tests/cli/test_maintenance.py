"""`ray-resume reset`, `compact` and `check`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from command import Terminal, one_line, run
from local_checkpoint import states

from ray_resume import Checkpoint, cli
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.records import Record, State, pipeline_hash

pytestmark = pytest.mark.long


def test_versions_are_counted_and_reset(tmp_path: Path) -> None:
    directory = LocalBackend(tmp_path / "ckpt")
    directory.ensure()
    for number, version in enumerate(["prompt 1", "prompt 2"]):
        header = {"signature": version, "versions": [version]}
        writer = WriterFile.create(directory.path, f"run{number}", header)
        pipeline = pipeline_hash(version)
        names = "abc"[: 3 - number]
        writer.commit(
            Record(name, State.COMPLETED, number, f"run{number}", pipeline=pipeline)
            for name in names
        )
        writer.close()
    lines = run("status", directory.path).stdout.splitlines()
    assert "Versions of completed sources: 1 of prompt 1, 2 of prompt 2" in lines
    refused = run("reset", directory.path, "--version", "prompt 2")
    assert refused.returncode == 2
    assert "2 completed sources of version 'prompt 2'" in refused.stderr
    done = run("reset", directory.path, "--version", "prompt 2", "--yes")
    assert done.stdout.startswith("2 sources forgotten.")
    missing = run("reset", directory.path, "--version", "prompt 2", "--yes")
    assert (missing.returncode, "'prompt 1'" in missing.stderr) == (1, True)
    both = run("reset", directory.path, "--version", "prompt 1", "--state", "all", "--yes")
    assert both.returncode == 2


def test_reset_of_named_sources_needs_no_answer(path: Path) -> None:
    result = run("reset", path, "--source", "a", "--source", "f\n1")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("2 sources forgotten.")
    assert set(states(path)) == {"b", "f2", "q"}


def test_reset_by_state_with_yes(path: Path) -> None:
    assert run("reset", path, "--state", "failed", "--yes").returncode == 0
    assert set(states(path)) == {"a", "b", "q"}
    assert run("reset", path, "--state", "all", "--yes").stdout.startswith("3 sources")
    assert states(path) == {}


def test_reset_by_state_with_nobody_to_ask_is_refused(path: Path) -> None:
    before = states(path)
    result = run("reset", path, "--state", "all", answer="y\n")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "ray-resume: This would forget 5 sources. Say so with --yes.\n"
    assert states(path) == before


@pytest.mark.parametrize(
    ("typed", "code", "left"), [("y\n", 0, "bq"), ("yes\n", 0, "bq"), ("\n", 1, ""), ("n\n", 1, "")]
)
def test_reset_asks_on_a_terminal(path: Path, typed: str, code: int, left: str) -> None:
    Checkpoint(path).reset(["a"])
    terminal = Terminal("reset", path, "--state", "failed")
    terminal.wait_for("[y/N] ")
    assert f"Forget 2 failed sources of {path}" in terminal.shown
    assert terminal.type(typed) == code
    assert set(states(path)) == (set(left) if left else {"b", "q", "f\n1", "f2"})
    if code:
        assert "Nothing was reset." in terminal.shown


def test_reset_of_named_sources_asks_on_a_terminal(path: Path) -> None:
    terminal = Terminal("reset", path, "--source", "a")
    terminal.wait_for("Forget 1 source of ")
    assert terminal.type("n\n") == 1
    assert "a" in states(path)


def test_sources_are_selected_by_patterns(path: Path) -> None:
    def ids(*options: object) -> list[str]:
        return [line.split("\t")[1] for line in run("sources", path, *options).stdout.splitlines()]

    assert ids("--glob", "f*") == ["f\\n1", "f2"]
    assert ids("--glob", "[ab]", "--source", "q") == ["q", "a", "b"]
    assert ids("--glob", "f*", "--state", "completed") == []
    found = json.loads(run("sources", path, "--glob", "?", "--json").stdout)
    assert [source["source_id"] for source in found] == ["a", "b", "q"]
    (part,) = run("parts", path, "--glob", "a").stdout.splitlines()
    assert part.endswith("\ta")
    result = run("reset", path, "--glob", "f*")
    assert (result.returncode, "would forget 2 sources" in result.stderr) == (2, True)
    result = run("reset", path, "--glob", "zz*", "--yes")
    assert (result.returncode, "zz*" in one_line(result.stderr)) == (1, True)
    assert run("reset", path, "--glob", "f*", "--source", "a", "--yes").returncode == 0
    assert set(states(path)) == {"b", "q"}


def test_reset_of_an_unknown_source(path: Path) -> None:
    result = run("reset", path, "--source", "zzz")
    assert (result.returncode, result.stdout) == (1, "")
    assert "no record of 'zzz'" in one_line(result.stderr)


@pytest.mark.parametrize("arguments", [["reset", "--source", "a"], ["compact"]])
def test_what_changes_something_waits_for_no_live_run(
    path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lease = Lease.acquire(path, Owner.here("run3"), Claim(frozenset()), wait_s=0)
    before = set(os.listdir(path))
    assert cli.main([arguments[0], str(path), *arguments[1:]]) == 1
    assert f"pid {os.getpid()}" in one_line(capsys.readouterr().err)
    assert set(os.listdir(path)) == before
    lease.end(wait_s=0)
    assert cli.main([arguments[0], str(path), *arguments[1:]]) == 0


def test_compact(path: Path) -> None:
    before = states(path)
    assert run("compact", path).stdout == "Merged 2 files of runs into one.\n"
    assert run("compact", path).stdout == "There is nothing to merge.\n"
    assert states(path) == before


def test_all_sources_of_a_shared_file_that_is_gone_are_told(shared: Path) -> None:
    [file] = (shared.parent / "out").glob("*.parquet")
    file.unlink()
    result = run("check", shared)
    assert "1 output files of 2 completed sources are gone" in result.stdout
    assert ".reset(['a', 'b" in result.stdout


def test_check(path: Path) -> None:
    result = run("check", path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"The checkpoint {path} is sound (2 writers' files,")
    (path.parent / "out" / "a.parquet").unlink()
    result = run("check", path)
    assert (result.returncode, result.stderr) == (1, "")
    assert "a.parquet" in result.stdout
    result = run("check", path, "--json")
    report = json.loads(result.stdout)
    assert (result.returncode, report["ok"], len(report["problems"])) == (1, False, 1)
    assert set(report) == {
        "ok",
        "checkpoint",
        "problems",
        "notes",
        "writers",
        "records",
        "sources",
        "files",
    }
