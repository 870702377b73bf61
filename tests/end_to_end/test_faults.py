"""Death at every named point: the next run, or Ray, goes on, and every row is there once."""

from __future__ import annotations

import ast
import contextlib
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_jobs import JOBS, Job, write_input
from job_drivers import Drive, job_drivers
from places import SCRIPTS
from snapshots import whole_files

import ray_resume
from ray_resume import Checkpoint, ResumeError
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.filenames import stem_of
from ray_resume.core.records import Record, State
from ray_resume.failpoints import Fault, armed, failpoint
from ray_resume.testing import check_exactly_once, kill_at, points, victim_pid

pytestmark = [pytest.mark.extended, pytest.mark.long]

PACKAGE = Path(ray_resume.__file__).parent
JOBS_SCRIPT = SCRIPTS / "fault_jobs.py"

Point: TypeAlias = tuple[str, int]
Row: TypeAlias = tuple[str, list[Point]]

# Which jobs get a worker to which points, and how often these are passed before that. All of a row
# happen in one run: Ray goes on after each.
WORKERS: list[Row] = [
    ("Ranges", [("read.before_register", 1), ("read.before_end", 1)]),
    ("Ranges", [("read.registered", 1), ("read.after_end", 1)]),
    ("Files", [("read.between_blocks", 1), ("stage.before_drain", 0), ("sink.written", 0)]),
    ("Files", [("read.before_seal", 1), ("stage.called", 2), ("sink.before_write", 0)]),
    ("Files", [("read.after_seal", 1), ("stage.after_drain", 0), ("stage.before_failures", 1)]),
    ("Files", [("stage.between_outputs", 1), ("sink.writing", 1), ("sink.after_drain", 0)]),
    ("Files", [("stage.after_failures", 1), ("sink.before_drain", 1)]),
    ("AsyncFiles", [("stage.called", 1)]),
    ("AsyncFiles", [("stage.between_outputs", 0)]),
    ("AsyncFiles", [("stage.before_drain", 0)]),
    ("AsyncFiles", [("stage.after_drain", 0)]),
    ("AsyncFiles", [("stage.before_failures", 1)]),
    ("AsyncFiles", [("stage.after_failures", 1)]),
    ("Published", [("datasink.before_write", 0), ("datasink.after_drain", 0)]),
    ("Published", [("datasink.before_drain", 1)]),
    ("Untidy", [("rewrite.copied", 0)]),
]

# The same for the ledger, of which each death ends a run. Only the last of a row may have
# committed all.
LEDGERS: list[Row] = [
    ("Files", [("store.making", 0), ("ledger.before_apply", 3), ("ledger.committed", 0)]),
    ("Files", [("store.made", 0), ("ledger.applied", 4), ("store.in_commit", 0)]),
    ("Files", [("ledger.before_commit", 0), ("letters.writing", 1), ("ledger.closing", 0)]),
    ("Files", [("letters.written", 1), ("ledger.closed", 0)]),
    ("Ranges", [("ledger.registering", 3), ("ledger.registered", 3)]),
    ("LongNames", [("store.before_growth", 0)]),
    ("LongNames", [("store.after_growth", 0)]),
    ("SharedFiles", [("shared.before_publish", 0), ("shared.published", 1)]),
    ("SharedFiles", [("shared.whole", 0)]),
    ("Marked", [("ledger.recording", 0), ("ledger.recorded", 0)]),
    ("Failing", [("ledger.failing", 0)]),
]

# The same for the driver. Before "cleanup." points another process dies, and leaves files to clean
# up.
DRIVERS: list[Row] = [
    ("Files", [("lease.created", 0), ("sink.before_drain", 0), ("cleanup.removing", 0)]),
    ("Files", [("run.bound", 0), ("letters.written", 0), ("cleanup.removing_letter", 0)]),
    ("Files", [("run.after_pass", 0)]),
    ("Files", [("run.closed", 0)]),
    ("Files", [("history.ended", 0)]),
    ("Files", [("lease.ending", 0)]),
    ("SharedFiles", [("shared.ending", 0)]),
    ("Marked", [("run.before_publish", 0), ("run.published", 0)]),
    ("Unanswered", [("run.settling", 0), ("run.settled", 0)]),
    ("Types", [("rewrite.written", 0), ("rewrite.committed", 0)]),
    ("Untidy", [("rewrite.registered", 0)]),
    ("Untidy", [("rewrite.removed", 0)]),
]

# Their like is tested every day: these with the slow ones.
QUIET: list[Row] = [
    ("Files", [("checkpoint.writing", 0), ("run.leased", 0), ("run.before_pass", 0)]),
    ("Files", [("run.before_close", 0)]),
    ("Files", [("sink.before_drain", 0), ("cleanup.before", 0)]),
    ("Files", [("sink.before_drain", 0), ("cleanup.removed", 0)]),
]

# Reached without Ray.
KEEPERS = {
    "reset.committed": "Checkpoint(path).reset(state='all')",
    "compact.merged": "Checkpoint(path).compact()",
    "compact.removing": "Checkpoint(path).compact()",
}


def _rows(rows: list[Row], slow: Callable[[Row], bool] = lambda row: False) -> list[Any]:
    """Name ``rows`` by their points, and mark those that are ``slow``."""
    return [
        pytest.param(*row, marks=[pytest.mark.slow] if slow(row) else [], id=_name(row))
        for row in rows
    ]


def _name(row: Row) -> str:
    job, deaths = row
    return f"{job}-{'-'.join(point for point, _ in deaths)}"


def job_in(folder: Path, name: str) -> Job:
    if name in ("Marked", "Unanswered"):
        pytest.importorskip("deltalake")
        pytest.importorskip("ray.data._internal.datasource.delta_datasink", reason="Ray 2.58")
    write_input(folder)
    return JOBS[name](folder)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("job_name", "deaths"), _rows(WORKERS, slow=lambda row: row[0] == "AsyncFiles")
)
def test_workers_die(tmp_path: Path, job_name: str, deaths: list[Point]) -> None:
    job = job_in(tmp_path, job_name)
    with contextlib.ExitStack() as stack:
        faults = [stack.enter_context(kill_at(point, after=skip)) for point, skip in deaths]
        job.run()
        assert len({fault.victim for fault in faults} - {None}) == len(deaths)
    job.check()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("job_name", "deaths"), _rows(LEDGERS))
def test_ledgers_die(tmp_path: Path, job_name: str, deaths: list[Point]) -> None:
    job = job_in(tmp_path, job_name)
    for point, skip in deaths:
        with kill_at(point, tmp_path / "faults", after=skip), pytest.raises(ResumeError):
            job.run()
        assert victim_pid(point, tmp_path / "faults") is not None
        job.check_truth()
    job.run()
    job.check()


@pytest.fixture(scope="module")
def drive(another_cluster: str) -> Iterator[Drive]:
    with job_drivers(JOBS_SCRIPT, another_cluster) as run:
        yield run


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("job_name", "deaths"), _rows([*DRIVERS, *QUIET], slow=lambda row: row in QUIET)
)
def test_drivers_die(tmp_path: Path, drive: Drive, job_name: str, deaths: list[Point]) -> None:
    job = job_in(tmp_path, job_name)
    others = []
    for point, _ in deaths:
        if points()[point].dies != "driver":
            others.append(point)
            continue
        code = drive(job_name, tmp_path, point, *others)
        assert code == -signal.SIGKILL, (tmp_path / "driver.log").read_text()
        assert victim_pid(point, tmp_path / "faults") is not None
        job.check_truth()
    job.run()
    job.check()


@pytest.mark.parametrize("point", KEEPERS)
def test_who_looks_after_a_checkpoint_dies(tmp_path: Path, point: str) -> None:
    """Death while resetting or compacting: nothing is forgotten, and it can be done again."""
    path = tmp_path / "ckpt"
    LocalBackend(path).ensure()
    for number in range(3):
        writer = WriterFile.create(path, f"{number:012x}", {})
        writer.commit([Record(f"/in/{number}", State.COMPLETED, 1, f"{number:012x}", rows=5)])
        writer.close()
    script = (
        "import sys\n"
        "from ray_resume import Checkpoint\n"
        "from ray_resume.testing import kill_at\n"
        "point, path, folder = sys.argv[1:]\n"
        f"with kill_at(point, folder, after={int(point == 'compact.removing')}):\n"
        f"    {KEEPERS[point]}\n"
    )
    victim = [sys.executable, "-c", script, point, str(path), str(tmp_path / "faults")]
    assert subprocess.run(victim).returncode == -signal.SIGKILL
    assert victim_pid(point, tmp_path / "faults") is not None

    checkpoint = Checkpoint(path)
    assert checkpoint.check(), checkpoint.check()
    reset = point == "reset.committed"
    assert len(list(checkpoint.sources("completed"))) == (0 if reset else 3)
    assert checkpoint.compact() >= 2
    assert len(list(path.glob("*.mdb"))) == 1
    assert len(list(checkpoint.sources("completed"))) == (0 if reset else 3)
    assert not list(path.glob("*.lease"))


def test_every_point_is_tested_and_in_the_code() -> None:
    tested = _points(WORKERS + LEDGERS + DRIVERS + QUIET) | KEEPERS.keys()
    tested |= {"shared.fenced"}  # in test_shared_leases.py
    assert tested == points().keys()
    calls = [
        node.args[0]
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "failpoint"
    ]
    assert {ast.literal_eval(argument) for argument in calls} == points().keys()
    for group, dies in ((WORKERS, "worker"), (LEDGERS, "ledger")):
        assert _points(group) == {name for name, point in points().items() if point.dies == dies}


def _points(rows: list[Row]) -> set[str]:
    return {point for _, deaths in rows for point, _ in deaths}


def test_what_is_not_armed_is_passed() -> None:
    assert not armed()
    for point in points():
        failpoint(point)
    with pytest.raises(ValueError, match=r"no point 'sink\.here'; there are read"):
        kill_at("sink.here").__enter__()


def test_nobody_who_gets_there_is_an_error(tmp_path: Path) -> None:
    told = r"No process died at sink\.writing: no worker got there more than 1 times"
    with pytest.raises(AssertionError, match=told), kill_at("sink.writing", tmp_path, after=1):  # noqa: PT012
        failpoint("sink.written")
        failpoint("sink.writing")
    # It is called off, for those too to whom it was sent.
    pickle.loads(pickle.dumps(Fault("sink.writing", str(tmp_path), 1)))
    assert armed()
    failpoint("sink.writing")
    assert not armed()
    assert victim_pid("sink.writing", tmp_path) is None


def test_an_error_in_the_block_is_not_hidden() -> None:
    with pytest.raises(KeyError), kill_at("sink.writing"):
        raise KeyError


def test_each_fault_happens_once_whoever_gets_there(tmp_path: Path) -> None:
    """Of five processes one passes, and one dies, wherever they have it from."""
    fault = Fault("sink.writing", str(tmp_path), after=1)
    fault.arm()
    try:
        script = (
            "import pickle, sys\n"
            "from ray_resume.failpoints import failpoint\n"
            "pickle.load(sys.stdin.buffer)\n"
            "failpoint('sink.writing')\n"
        )
        processes = [
            subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE)
            for _ in range(5)
        ]
        for process in processes:
            process.communicate(pickle.dumps(fault))
    finally:
        fault.disarm()
    assert sorted(process.returncode for process in processes) == [-signal.SIGKILL, 0, 0, 0, 0]
    (dead,) = (process.pid for process in processes if process.returncode)
    assert fault.victim == dead


class TestCheckExactlyOnce:
    """The check itself: that it finds what is wrong."""

    @pytest.fixture
    def finished(self, tmp_path: Path) -> Path:
        directory, out = LocalBackend(tmp_path / "ckpt"), tmp_path / "out"
        identity = directory.ensure()
        directory.bind(str(out), "0" * 12)
        names = []
        for half in range(2):
            folder = f"c=a%2F{half}"
            name = f"{folder}/{stem_of(f'{identity}-{0:012x}', bytes(8), folder)}.parquet"
            (out / name).parent.mkdir(parents=True)
            pq.write_table(pa.table({"id": [half, half]}), out / name)
            names.append(name)
        writer = WriterFile.create(directory.path, "0" * 12, {"sources_total": 1})
        parts = whole_files(*names, rows=2)
        writer.commit([Record("/in/0", State.COMPLETED, 1, "0" * 12, rows=4, parts=parts)])
        writer.close()
        return directory.path

    ROWS = tuple({"id": half, "c": f"a/{half}"} for half in (0, 0, 1, 1))

    def test_it_passes(self, finished: Path) -> None:
        check_exactly_once(finished, reversed(self.ROWS))

    def test_missing_and_doubled_rows(self, finished: Path) -> None:
        with pytest.raises(AssertionError, match="1 rows are missing and 0 too many of 5"):
            check_exactly_once(finished, [*self.ROWS, {"id": 7, "c": "a/0"}])
        with pytest.raises(AssertionError, match="0 rows are missing and 1 too many of 3: none"):
            check_exactly_once(finished, self.ROWS[:3])

    def test_a_left_over(self, finished: Path) -> None:
        (file,) = (finished.parent / "out/c=a%2F0").iterdir()
        shutil.copy(file, file.with_name(f".{file.name}"))
        with pytest.raises(AssertionError, match="1 files are left over"):
            check_exactly_once(finished, self.ROWS)

    def test_a_file_that_is_gone(self, finished: Path) -> None:
        (file,) = (finished.parent / "out/c=a%2F0").iterdir()
        file.unlink()
        with pytest.raises(AssertionError, match="is damaged"):
            check_exactly_once(finished, self.ROWS)

    def test_an_unfinished_job(self, finished: Path) -> None:
        writer = WriterFile.create(finished, "1" * 12, {"sources_total": 2})
        writer.close()
        with pytest.raises(AssertionError, match="not finished"):
            check_exactly_once(finished, self.ROWS)
