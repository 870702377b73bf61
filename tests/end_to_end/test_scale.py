"""What millions of sources cost: small runs of the benchmark, and a model of a cluster."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from cluster import Cluster, Costs, needs, simulate
from places import ROOT

pytestmark = [pytest.mark.extended, pytest.mark.long]

BENCHMARK = ROOT / "tests" / "benchmarks" / "scale.py"


def benchmark(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARK), *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=3600)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_the_ledgers_process_keeps_little_of_a_source() -> None:
    weights = benchmark("memory", "--sources", "20000")["bytes_per_source"]
    assert weights["pending"] < 120
    assert weights["pending, with rows in a file"] < 600
    assert weights["half of them complete"] < 350
    assert weights["complete"] < 180


def test_the_ledger_and_the_store_without_ray() -> None:
    found = benchmark("ledger", "--sources", "20000")
    # Generous, for busy machines: a tenth of what an idle one does.
    assert found["durable_completions_per_s"] > 10_000


def test_planning_takes_the_same_for_few() -> None:
    """What the slow test measures works at all."""
    found = benchmark("plan", "--sources", "2000")
    assert found["plan"]["total_cpu_s"] < 5
    assert found["bytes_per_source"] < 200


@pytest.mark.slow
def test_a_million_finished_sources_are_planned_in_seconds() -> None:
    found = benchmark("plan")
    # Processor time, since tests share the machine with others; 3 s where nobody else is at work.
    assert found["plan"]["total_cpu_s"] < 6
    assert found["plan"]["peak_mb"] < 500
    assert found["status"]["cpu_seconds"]["status"] < 5
    assert found["status"]["status_mb"] < 500


@pytest.mark.slow
def test_ten_million_sources_in_ledger_and_store() -> None:
    found = benchmark("ledger", "--sources", "10000000")
    assert found["durable_completions_per_s"] > 20_000
    assert found["longest_answer_s"] < 10


def test_a_job_over_tiny_files() -> None:
    """What the slow test measures works at all."""
    found = benchmark("run", "--sources", "300")
    assert found["again"]["seconds"]["run"] < 10


@pytest.mark.slow
def test_a_job_over_a_million_tiny_files() -> None:
    found = benchmark("run", "--sources", "1000000")
    assert found["again"]["cpu_seconds"]["run"] < 6
    assert found["job"]["driver_mb"] < 1000
    assert found["job"]["ledger_mb"] < 500


# A cluster ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "source_s", "per_task"), [(10_000, 5.0, 100), (500, 1.0, 1), (10_000, 2.0, 10)]
)
def test_the_model_of_a_cluster_agrees_with_its_arithmetic(
    workers: int, source_s: float, per_task: int
) -> None:
    job = Cluster(workers=workers, source_s=source_s, sources_per_task=per_task)
    core = next(need for need in needs(job, Costs()) if need.what == "ledger: a core")
    traffic = simulate(job, Costs())
    assert core.load < 0.9
    assert traffic.busy == pytest.approx(core.load, rel=0.15)
    assert traffic.slowdown < 1.2


def test_a_ledger_that_is_asked_too_much_slows_the_cluster_down_as_much() -> None:
    job = Cluster(source_s=1.0, sources_per_task=1)
    core = next(need for need in needs(job, Costs()) if need.what == "ledger: a core")
    assert core.load > 2
    traffic = simulate(job, Costs())
    assert traffic.busy > 0.95
    assert traffic.slowdown == pytest.approx(core.load, rel=0.15)
    # As many ledgers as it takes.
    several = replace(job, shards=2 * math.ceil(core.load))
    assert simulate(several, Costs()).slowdown < 1.2
