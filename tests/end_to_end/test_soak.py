"""Random kills over mixed pipelines: in the end every row is there once. See CONTRIBUTING.

Settings, as environment variables: SOAK_KILLS (40), SOAK_SEED (drawn, and printed), SOAK_JOBS (all;
names of pipelines with spaces between them).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import holders
from job import WITHOUT_TOKENS, kill_with_descendants, signal_each
from places import SCRIPTS
from soak_driver import FILES, PIPELINES, Pipeline

from ray_resume import Checkpoint, CheckpointError

pytestmark = pytest.mark.long

DRIVER = SCRIPTS / "soak_driver.py"

# Longer than a driver waits for a lease, and for Ray's worst start of a worker.
HANG_S = 300.0
# From the moment that a run holds its lease; beyond it, most have ended.
LATEST_S = 9.0
MOST_WORKERS_A_RUN = 2
WORKERS_WITHIN_S = 5.0

# What may die where there are others to go on; and what does where a cluster is the driver's own.
KINDS = ("driver", "ledger", "stopped", "worker", "worker")


class Cluster:
    """A cluster of the soak's own, which outlives drivers."""

    def __init__(self) -> None:
        command = [sys.executable, str(SCRIPTS / "small_cluster.py"), "4"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=WITHOUT_TOKENS
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def end(self) -> None:
        kill_with_descendants(self.process.pid)
        self.process.communicate()


class Driver:
    """One driver of a pipeline, perhaps with a cluster of its own."""

    def __init__(self, job: Job, part: int, cluster: Cluster | None) -> None:
        self.job, self.cluster = job, cluster
        address = [cluster.address] if cluster else []
        arguments = [job.name, str(job.pipeline.folder), str(part), *address]
        self.log = job.pipeline.folder / f"driver-{job.runs}-{part}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, DRIVER, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=WITHOUT_TOKENS,
            )
        job.runs += 1
        self.started_at = time.monotonic()
        self.may_fail = False

    def is_over(self) -> bool:
        if self.process.poll() is None:
            assert time.monotonic() < self.started_at + HANG_S, f"it hangs: {self.told()}"
            return False
        assert self.process.returncode == 0 or self.may_fail, self.told()
        return True

    def told(self) -> str:
        return f"{self.job.name}: {self.log.read_text()[-4000:]}"

    def lease(self) -> Path | None:
        """The lease that this driver holds, if it does."""
        for path in self.job.leases():
            with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
                if json.loads(file.readline())["pid"] == self.process.pid:
                    return path
        return None

    def ledger(self) -> psutil.Process | None:
        lease = self.lease()
        found = (p for p in holders(lease) if p.pid != self.process.pid) if lease else iter(())
        return next(found, None)

    def workers(self) -> list[psutil.Process]:
        """Processes that execute a part of some pipeline right now."""
        root = self.cluster.process.pid if self.cluster else self.process.pid
        found = []
        for process in psutil.Process(root).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if re.match(r"ray::(Map|Read|Write|Filter|FlatMap)", " ".join(process.cmdline())):
                    found.append(process)
        return found


class Job:
    """A pipeline, its input, and how often it was run."""

    def __init__(self, name: str, folder: Path) -> None:
        folder.mkdir()
        self.name, self.runs = name, 0
        self.pipeline: Pipeline = PIPELINES[name](folder)
        self.pipeline.write_input()

    def is_done(self) -> bool:
        with contextlib.suppress(CheckpointError):
            return Checkpoint(self.pipeline.checkpoint).status().completed == FILES
        return False

    def leases(self) -> Iterator[Path]:
        """The files that processes of this host hold."""
        checkpoint = self.pipeline.checkpoint
        yield from checkpoint.glob("*.lease")
        # Where hosts share it, those are apart.
        with contextlib.suppress(OSError, ValueError):
            identity = json.loads((checkpoint / "checkpoint.json").read_bytes())["id"]
            user = Path(tempfile.gettempdir(), f"ray_resume-{os.getuid()}")
            yield from (user / identity).glob("*.lease")

    def check_sound(self) -> None:
        """Nothing that is committed is damaged or gone, whatever was killed."""
        with contextlib.suppress(CheckpointError):
            report = Checkpoint(self.pipeline.checkpoint).check()
            assert report.ok, f"{self.name}: {report}"

    def check(self) -> None:
        self.pipeline.check()


class Soak:
    """Runs pipelines and kills what belongs to them, as a seeded generator says."""

    def __init__(self, folder: Path, seed: int, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.random = random.Random(seed)
        self.names = os.environ.get("SOAK_JOBS", "").split() or list(PIPELINES)
        self.kills: Counter[str] = Counter()
        self.stops = self.runs = 0
        self.jobs: list[Job] = []
        self.unfinished: dict[str, Job] = {}
        self.drivers: list[Driver] = []

    def step(self) -> None:
        """Run some pipeline until it was killed, or has ended."""
        name = self.random.choice(self.names)
        job = self.unfinished.get(name)
        if job is None:
            job = self.unfinished[name] = Job(name, self.folder / f"{len(self.jobs)}-{name}")
            self.jobs.append(job)
        alone = job.pipeline.parts == 1 and self.random.random() < 0.25
        self._start(job, None if alone else self.cluster)
        driver = self.random.choice(self.drivers)
        for _ in range(MOST_WORKERS_A_RUN + 1):
            kind = "job" if alone else self.random.choice(KINDS)
            if not self._wait(driver) or self._strike(kind, driver):
                break
        self._settle(job)

    def finish(self) -> None:
        """Run to their end what is not done yet, and check everything."""
        for job in list(self.unfinished.values()):
            # A job whose sources are complete, too: its last run did not come to its clean-up.
            while job.name in self.unfinished:
                self._start(job, self.cluster)
                self._settle(job)
        for job in self.jobs:
            job.check()

    def _start(self, job: Job, cluster: Cluster | None) -> None:
        self.drivers = [Driver(job, part, cluster) for part in range(job.pipeline.parts)]
        self.runs += len(self.drivers)

    def _wait(self, driver: Driver) -> bool:
        """Wait for a random moment of a run; say whether it came before its end."""
        if self.random.random() < 0.9:
            while driver.lease() is None and not driver.is_over():
                time.sleep(0.02)
        moment = time.monotonic() + self.random.uniform(0, LATEST_S)
        while time.monotonic() < moment and not driver.is_over():
            time.sleep(0.005)
        return not driver.is_over()

    def _strike(self, kind: str, driver: Driver) -> bool:
        """Kill something of a run; say whether the run is over by that."""
        if kind == "job":
            kill_with_descendants(driver.process.pid)
        elif kind == "driver":
            driver.process.kill()
        elif kind == "worker":
            deadline = time.monotonic() + WORKERS_WITHIN_S
            while not (workers := driver.workers()):
                if driver.is_over() or time.monotonic() > deadline:
                    return False
                time.sleep(0.01)
            signal_each([self.random.choice(workers)], signal.SIGKILL)
            self.kills[kind] += 1
            return False
        else:
            ledger = driver.ledger()
            if ledger is None:
                return False
            if kind == "stopped":
                return self._stop(ledger, driver)
            signal_each([ledger], signal.SIGKILL)
        driver.may_fail = True
        self.kills[kind] += 1
        return True

    def _stop(self, ledger: psutil.Process, driver: Driver) -> bool:
        """Stop a ledger for a while, perhaps with a driver that dies and a successor that waits."""
        with contextlib.suppress(psutil.NoSuchProcess):
            ledger.send_signal(signal.SIGSTOP)
        self.stops += 1
        killed = self.random.random() < 0.7
        if killed:
            driver.may_fail = True
            driver.process.kill()
            self.kills["driver of a stopped ledger"] += 1
            self._start_again(driver)
        time.sleep(self.random.uniform(0.5, 8 if killed else 3))
        with contextlib.suppress(psutil.NoSuchProcess):
            ledger.send_signal(signal.SIGCONT)
        return killed

    def _start_again(self, driver: Driver) -> None:
        part = self.drivers.index(driver)
        self.drivers.append(Driver(driver.job, part, driver.cluster))
        self.runs += 1

    def _settle(self, job: Job) -> None:
        """Wait for drivers that live on, and see that the checkpoint is sound."""
        while not all(driver.is_over() for driver in self.drivers):
            time.sleep(0.1)
        job.check_sound()
        if job.is_done() and not any(driver.may_fail for driver in self.drivers):
            del self.unfinished[job.name]

    def end(self) -> None:
        for driver in self.drivers:
            if driver.process.poll() is None:
                kill_with_descendants(driver.process.pid)
                driver.process.wait()


@pytest.fixture
def soak(tmp_path: Path) -> Iterator[Soak]:
    seed = int(os.environ.get("SOAK_SEED") or int.from_bytes(os.urandom(4), "big"))
    print(f"SOAK_SEED={seed}")
    cluster = Cluster()
    soak = Soak(tmp_path, seed, cluster)
    yield soak
    soak.end()
    cluster.end()


@pytest.mark.slow
def test_random_kills(soak: Soak) -> None:
    began = time.monotonic()
    wanted = int(os.environ.get("SOAK_KILLS", "40"))
    while soak.kills.total() < wanted:
        soak.step()
        print(f"{time.monotonic() - began:.0f} s, {soak.runs} runs, {dict(soak.kills)}", flush=True)
    soak.finish()
    print(
        f"{soak.kills.total()} kills ({dict(soak.kills)}), {soak.stops} ledgers stopped, "
        f"{soak.runs} runs of {len(soak.jobs)} jobs "
        f"({dict(Counter(job.name for job in soak.jobs))}), {time.monotonic() - began:.0f} s: "
        "every row exactly once."
    )
