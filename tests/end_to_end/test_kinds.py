"""Kills of pipelines over tables, into each format, and with a processor of `ray.data.llm`."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from job_drivers import Drive, job_drivers
from kind_jobs import KINDS, Kind
from model_server import Model
from places import SCRIPTS

from ray_resume import ResumeError
from ray_resume.testing import kill_at, victim_pid

pytestmark = [pytest.mark.extended, pytest.mark.long, pytest.mark.usefixtures("cluster")]

MODULES = {"OfLance": "lance", "OfDelta": "deltalake", "OfIceberg": "pyiceberg"}
MODULES |= {"AsTfrecords": "tensorflow", "OfModel": "ray.data.llm"}

# At which processes die at random.
POINTS = (
    *("read.between_blocks", "read.before_seal", "read.after_seal", "stage.called"),
    *("sink.before_write", "sink.writing", "sink.written", "sink.before_drain", "sink.after_drain"),
    *("rewrite.copied", "ledger.applied", "ledger.committed", "store.in_commit", "ledger.closing"),
    *("run.leased", "run.before_pass", "run.after_pass", "run.before_close", "run.closed"),
    *("cleanup.removing", "rewrite.written", "rewrite.committed", "rewrite.removed"),
)


def prepared(name: str, folder: Path, model: Model) -> Kind:
    if name in MODULES:
        pytest.importorskip(MODULES[name], exc_type=ImportError)
    (folder / "url").write_text(model.url())
    job = KINDS[name](folder)
    job.prepare()
    job.gate.touch()
    return job


@pytest.mark.parametrize(
    "name",
    [pytest.param(k, marks=pytest.mark.slow) if k == "AsTfrecords" else k for k in KINDS],
)
def test_workers_and_the_ledger_die(name: str, tmp_path: Path, model: Model) -> None:
    job = prepared(name, tmp_path, model)
    worker, ledger, later = job.points
    plain = job.plain_rows()
    # The ledger dies once it has committed some sources, and cannot have the last one before.
    job.gate.unlink()
    with ExitStack() as faults:
        for point in (worker, ledger):
            faults.enter_context(kill_at(point, tmp_path / "faults"))
        faults.enter_context(pytest.raises(ResumeError))
        job.run()
    assert victim_pid(worker, tmp_path / "faults")
    assert 0 < job.check_committed(plain) < plain.total()
    job.gate.touch()
    job.change()
    with kill_at(later):
        job.run()
    job.check()


@pytest.fixture(scope="module")
def drive(another_cluster: str) -> Iterator[Drive]:
    with job_drivers(SCRIPTS / "kind_jobs.py", another_cluster) as run:
        yield run


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("OfIceberg", "run.before_close"),
        ("AsWebdataset", "rewrite.written"),
    ],
)
def test_the_driver_dies(name: str, point: str, tmp_path: Path, model: Model, drive: Drive) -> None:
    job = prepared(name, tmp_path, model)
    plain = job.plain_rows()
    assert drive(name, tmp_path, point) == -signal.SIGKILL, (tmp_path / "driver.log").read_text()
    assert job.check_committed(plain) == plain.total()
    job.change()
    job.run()
    job.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_processes_die_at_random_points(
    name: str, tmp_path: Path, model: Model, drive: Drive
) -> None:
    job = prepared(name, tmp_path, model)
    plain = job.plain_rows()
    seed = random.randrange(1000)
    print(f"random.Random({seed})")
    chosen = random.Random(seed)
    killed = 0
    for _ in range(8):
        some = [f"{point}:{chosen.choice([0, 0, 1])}" for point in chosen.sample(POINTS, 4)]
        code = drive(name, tmp_path, *some)
        log = (tmp_path / "driver.log").read_text()
        expected = "No process died at", "The ledger of run"
        assert code in (0, -signal.SIGKILL) or any(text in log for text in expected), log
        killed += len(list((tmp_path / "faults").glob("*.victim")))
        shutil.rmtree(tmp_path / "faults")
        made = (tmp_path / "ckpt/checkpoint.json").exists()
        if made and job.check_committed(plain) == plain.total():
            # The next one starts over.
            for folder in ("ckpt", "out"):
                shutil.rmtree(tmp_path / folder)
    assert killed
    job.run()
    assert job.check_committed(plain) == plain.total()
    job.change()
    job.run()
    job.check()
