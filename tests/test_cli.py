"""The `ray-resume` command, as its users type it."""

from __future__ import annotations

import io
import json
import os
import pty
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from snapshots import whole_files

import ray_resume
from ray_resume import Checkpoint, cli
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local import backend as directory_module
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record, State, pipeline_hash
from ray_resume.core.wording import counted

pytestmark = pytest.mark.long

COMMANDS = ("status", "sources", "runs", "files", "parts", "reset", "compact", "tidy", "check")
NEEDED = {"reset": ["--source", "a"]}
DEADLINE_S = 30.0
RUN = "0123456789ab"


@pytest.fixture(autouse=True)
def _short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_module, "_MAX_DEATH_DETECTION_S", 0.1)


def write(directory: Path, run_id: str, total: int, records: list[Record]) -> None:
    writer = WriterFile.create(directory, run_id, {"sources_total": total})
    writer.commit(records)
    writer.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Make the checkpoint of two runs: two done, two failed, one given up, one of six not read."""
    out = tmp_path / "out"
    out.mkdir()
    directory = LocalBackend(tmp_path / "ckpt")
    directory.ensure()
    directory.bind(str(out), "")
    now = time.time()
    done = [
        Record(
            name,
            State.COMPLETED,
            n,
            "run1",
            10,
            whole_files(f"{name}.parquet"),
            completed_at=now - 7200,
        )
        for n, name in enumerate("ab", 1)
    ]
    for record in done:
        (out / record.files[0]).write_bytes(b"rows")
    failed = [
        Record(name, State.FAILED, n, "run2", error=f"Trace\n {n}\nValueError: bad", failed_runs=1)
        for n, name in enumerate(["f\n1", "f2"], 3)
    ]
    given_up = Record("q", State.QUARANTINED, 5, "run2", error="\x1b[31mboom", failed_runs=3)
    write(directory.path, "run1", 6, done)
    write(directory.path, "run2", 6, [*failed, given_up])
    return directory.path


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Make the output of a killed run: a file with rows of two sources, and a row of a third."""
    directory = LocalBackend(tmp_path / "ckpt")
    name = f"{directory.ensure()}-{RUN}-{0:016x}-{1:016x}.parquet"
    (tmp_path / "out").mkdir()
    directory.bind(str(tmp_path / "out"), "")
    pq.write_table(pa.table({"id": range(4)}), tmp_path / "out" / name)
    parts = {"a": FilePart(name, 0, 2, 4), "b\nb": FilePart(name, 3, 1, 4)}
    records = [
        Record(source, State.COMPLETED, n, RUN, part.rows, (part,), completed_at=1.7e9)
        for n, (source, part) in enumerate(parts.items(), 1)
    ]
    write(directory.path, RUN, 3, records)
    return directory.path


def run(*arguments: object, answer: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, without a terminal."""
    command = list(map(str, arguments))
    printed, told = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(answer or ""))
        patch.setattr(sys, "stdout", printed)
        patch.setattr(sys, "stderr", told)
        try:
            code = cli.main(command)
        except SystemExit as over:
            code = int(over.code or 0)
    texts = []
    for stream in (printed, told):
        stream.seek(0)
        texts.append(stream.read())
    return subprocess.CompletedProcess(command, code, *texts)


def run_alone(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, without a terminal."""
    command = [sys.executable, "-m", "ray_resume", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ray_resume", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def states(path: Path) -> dict[str, str]:
    return {source.source_id: source.state for source in Checkpoint(path).sources()}


class Terminal:
    """The command with a terminal for all three of its streams."""

    def __init__(self, *arguments: object) -> None:
        self._fd, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ray_resume", *map(str, arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            self.shown += os.read(self._fd, 4096).decode()

    def type(self, text: str) -> int:
        os.write(self._fd, text.encode())
        code = self.process.wait(DEADLINE_S)
        self.shown += os.read(self._fd, 65536).decode()
        os.close(self._fd)
        return code


# The start.


def test_the_console_script_is_declared() -> None:
    text = (Path(ray_resume.__file__).parents[1] / "pyproject.toml").read_text()
    assert '[project.scripts]\nray-resume = "ray_resume.cli:main"\n' in text


LOADED = """
import sys
from ray_resume.cli import main

try:
    code = main(sys.argv[1:])
except SystemExit as over:
    code = over.code
heavy = ("ray", "pyarrow", "pandas", "lmdb")
print(code, [name for name in heavy if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments", [["status"], ["status", "--json"], ["sources"], ["runs"], ["files"], ["check"]]
)
def test_nothing_heavy_is_loaded_but_what_records_are_in(path: Path, arguments: list[str]) -> None:
    name, *options = arguments
    command = [sys.executable, "-c", LOADED, name, str(path), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr == "0 ['pyarrow']\n"


def test_parts_of_files_load_nothing_else(shared: Path) -> None:
    command = [sys.executable, "-c", LOADED, "status", str(shared)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr == "0 ['pyarrow']\n"


def test_changing_something_loads_no_ray(path: Path) -> None:
    for arguments in (["reset", str(path), "--source", "a"], ["compact", str(path)]):
        command = [sys.executable, "-c", LOADED, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert result.stderr == "0 ['pyarrow', 'lmdb']\n"


def test_it_starts_in_well_under_a_second(path: Path) -> None:
    def cpu_s() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    took = []
    for _ in range(2):
        started = cpu_s()
        assert run_alone("status", path).returncode == 0
        took.append(cpu_s() - started)
    assert min(took) < 1.0


# Status.


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


@pytest.fixture
def dead(path: Path) -> Path:
    """Make a checkpoint of two runs that are done, with rows in dead letters."""
    directory = LocalBackend(path)
    writer = WriterFile.create(path, "run3", {"sources_total": 6})
    letters = {"f\n1": (1, ("l1",)), "x": (1234, ("l2", "l3"))}
    writer.commit(
        Record(
            name,
            State.COMPLETED,
            n,
            "run3",
            1,
            whole_files("a.parquet"),
            completed_at=time.time(),
            dead_rows=letters.get(name, (0, ()))[0],
            dead_letters=letters.get(name, (0, ()))[1],
        )
        for n, name in enumerate(["f\n1", "f2", "q", "x"], 9)
    )
    writer.close()
    history = directory.history()
    now = time.time()
    start = {"host": "h\x1b1", "pid": 7, "sources_total": 6}
    history.begin("run2", {**start, "started_at": now - 7300})
    history.begin("run3", {**start, "started_at": now - 90, "shard": "shard 1 of 2"})
    failed = {"outcome": "failed", "error": "Trace\nValueError: b\x1bad", "rows_written": 1234567}
    history.end("run3", {**failed, "ended_at": now - 30, "sources_completed": 4})
    return path


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


# Watching.


def test_watch_ends_with_the_last_live_run(path: Path) -> None:
    lease = Lease.acquire(path, Owner.here("run3"), Claim(None), wait_s=0)
    process = start("status", path, "--watch", "--json", "--interval", 0.05)
    assert process.stdout is not None
    looks = [json.loads(process.stdout.readline()) for _ in range(3)]
    assert [look["runs"][0]["alive"] for look in looks] == [True] * 3
    lease.end(wait_s=0)
    rest, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (0, "")
    assert json.loads(rest.splitlines()[-1])["live"] == 0


def test_watch_without_a_live_run_is_one_look(path: Path) -> None:
    result = run("status", path, "--watch", "--json")
    assert (result.returncode, len(result.stdout.splitlines())) == (0, 1)


def test_watch_is_left_quietly(path: Path) -> None:
    lease = Lease.acquire(path, Owner.here("run3"), Claim(None), wait_s=0)
    process = start("status", path, "--watch", "--interval", 30)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (130, "")
    lease.end(wait_s=0)


def test_watch_on_a_terminal_refreshes_the_screen(path: Path) -> None:
    lease = Lease.acquire(path, Owner.here("run3"), Claim(None), wait_s=0)
    terminal = Terminal("status", path, "--watch", "--interval", "0.05")
    terminal.wait_for("Ctrl-C to leave")
    assert terminal.shown.startswith("\x1b[H\x1b[2J2 of 6 sources")
    terminal.shown = ""
    terminal.wait_for("\x1b[H\x1b[2J")
    lease.end(wait_s=0)
    terminal.wait_for("No run is at work.")
    assert terminal.process.wait(DEADLINE_S) == 0


@pytest.mark.extended
def test_an_interrupt_at_any_moment_is_quiet(path: Path) -> None:
    lease = Lease.acquire(path, Owner.here("run3"), Claim(None), wait_s=0)
    moments = random.Random(4)
    for _ in range(10):
        process = start("status", path, "--watch", "--json", "--interval", 0.001)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, errors) == (130, "")
    lease.end(wait_s=0)


# Lists.


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


# Reset.


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


# Compact and check.


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


# Errors.


def one_line(text: str) -> str:
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    assert text.startswith("ray-resume: ")
    return text


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_checkpoint(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [command, str(tmp_path / "no\nne"), *NEEDED.get(command, [])]
    assert cli.main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "There is no checkpoint at" in one_line(said.err)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("check", "runs")])
def test_a_damaged_checkpoint(path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = (path / "run2.mdb").read_bytes()
    (path / "run2.mdb").write_bytes(data[:4096])
    assert cli.main([command, str(path), *NEEDED.get(command, [])]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "run2.mdb" in one_line(said.err)


def test_a_checkpoint_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "ftp://host/ckpt"]) == 1
    one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["frobnicate", "x"],
        ["status"],
        ["status", "x", "--jsn"],
        ["status", "x", "--js"],
        ["status", "x", "--interval", "soon"],
        ["status", "x", "--interval", "0"],
        ["sources", "x", "--state", "pending"],
        ["files", "x", "--json", "-0"],
        ["reset", "x"],
        ["reset", "x", "--yes"],
        ["reset", "x", "--state", "failed", "--source", "a"],
        ["reset", "x", "--state", "failed", "--dead-letters"],
        ["sources", "x", "--state"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as over:
        cli.main(arguments)
    assert over.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "--help" in one_line(said.err)


def test_help_and_version() -> None:
    result = run("--help")
    assert result.returncode == 0
    for command in COMMANDS:
        assert command in result.stdout
        assert run(command, "--help").returncode == 0
    assert run("--version").stdout == f"ray-resume {ray_resume.__version__}\n"


def test_shells_complete_commands_and_options(path: Path) -> None:
    def complete(words: str, number: int) -> list[str]:
        result = subprocess.run(
            [sys.executable, "-m", "ray_resume"],
            capture_output=True,
            text=True,
            check=True,
            env={
                **os.environ,
                "_RAY_RESUME_COMPLETE": "bash_complete",
                "COMP_WORDS": words,
                "COMP_CWORD": str(number),
            },
        )
        return [line.partition(",")[2] for line in result.stdout.splitlines()]

    assert complete("ray-resume s", 1) == ["status", "sources"]
    assert complete(f"ray-resume reset {path} --state q", 4) == ["quarantined"]
    assert "--fail-if-incomplete" in complete(f"ray-resume status {path} --", 3)


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (12345, "12,345 rows")]
)
def test_nouns_agree_with_their_number(number: int, text: str) -> None:
    assert counted(number, "row") == text


# The lazy names.


def test_the_package_is_as_it_was_with_names_loaded_late() -> None:
    script = (
        "import pickle, sys\n"
        "from ray_resume import *\n"
        "import ray_resume\n"
        "assert set(dir(ray_resume)) >= set(ray_resume.__all__)\n"
        "error = pickle.loads(pickle.dumps(ray_resume.CheckpointError('x')))\n"
        "assert type(error) is CheckpointError and resumable is ray_resume.resumable\n"
        "record = SourceRecord('a', 'failed', 0, (), None, 1, 'r', None)\n"
        "assert pickle.loads(pickle.dumps(record)) == record\n"
        "assert hasattr(ray_resume, 'nonsense') is False\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before: Any = signal.getsignal(signal.SIGPIPE)
    yield
    assert signal.getsignal(signal.SIGPIPE) == before
