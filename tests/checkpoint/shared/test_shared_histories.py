"""Many runs on one shared checkpoint, with deaths and stops at any moment: nothing is lost.

The shipped code of `backend`, `mutex`, `heartbeat` and `segments` runs in a `world`; only Ray, LMDB
and the kernel's locks are left out.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from shared_history import SOURCES, TTL_S, History, NoLock, chance

from ray_resume.checkpoint.local.lease import Lease
from ray_resume.checkpoint.shared import published, scratch, segments
from ray_resume.checkpoint.shared import writer as shared_writer
from ray_resume.checkpoint.shared.backend import SharedBackend
from ray_resume.checkpoint.shared.leases import SharedLease
from ray_resume.errors import CheckpointError

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def _no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process is on a host of its own: no lock proves anything."""
    monkeypatch.setattr(scratch, "boot_id", lambda: None)
    monkeypatch.setattr(
        Lease, "hold_unclaimed", classmethod(lambda cls, directory, owner: NoLock())
    )
    monkeypatch.setattr(shared_writer, "_FEW_SEGMENTS", 3)
    monkeypatch.setattr(os, "urandom", lambda count: chance.randbytes(count))


def run_history(seed: int, **faults: Any) -> History:
    history = History(seed, **faults)
    choose = history.world.random
    everything = [f"s{i}" for i in range(SOURCES)]
    for _ in range(choose.randrange(2, 6)):
        if choose.random() < 0.2:
            history.start([], work=history.compact)
            continue
        if choose.random() < 0.15:
            history.start(choose.sample(everything, 2), work=history.reset)
            continue
        kind = choose.random()
        if kind < 0.4:
            sources = everything
        elif kind < 0.8:
            half = choose.randrange(2)
            sources = everything[half::2]
        else:
            sources = choose.sample(everything, choose.randrange(1, SOURCES))
        history.start(sources)
    history.world.run()
    return history


def check_history(seed: int, **faults: Any) -> None:
    history = run_history(seed, **faults)
    try:
        history.check()
    except AssertionError:
        print(seed, *history.world.log, sep="\n")
        raise


@pytest.mark.parametrize(
    ("deaths", "stops", "errors", "seeds"),
    [
        (0, 0, 0, 10),
        (0.01, 0, 0, 10),
        (0, 0.01, 0, 10),
        (0.005, 0.01, 0, 10),
        (0.003, 0.004, 8, 10),
        pytest.param(0.01, 0, 0, 40, marks=pytest.mark.extended),
        pytest.param(0, 0.01, 0, 60, marks=pytest.mark.extended),
        pytest.param(0.005, 0.01, 0, 60, marks=pytest.mark.extended),
        pytest.param(0.003, 0.004, 8, 60, marks=pytest.mark.extended),
    ],
)
def test_what_was_committed_is_there_once(
    deaths: float, stops: float, errors: float, seeds: int
) -> None:
    for seed in range(seeds):
        check_history(seed, deaths=deaths, stops=stops, errors=errors)


def zombie(seed: int) -> History:
    """Let a run be stopped while it publishes, and go on when its successor has cleaned up."""
    history = History(seed)
    everything = [f"s{i}" for i in range(SOURCES)]
    history.objects.stops["runs/000000000001/000000002.part"] = 20 * TTL_S
    history.start(everything)
    history.world.run(until=lambda: any(name.startswith("out/") for name in history.world.objects))
    history.start(everything)
    history.world.run()
    return history


def test_what_a_dead_run_still_publishes_counts_for_nobody() -> None:
    for seed in range(10):
        history = zombie(seed)
        assert set(history.acknowledged.values()) == {f"{2:012x}"}
        assert "runs/000000000001/000000002.part" in history.world.objects
        history.check()


def test_a_successor_without_fences_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its predecessor's files are gone, and its late records would list them."""
    monkeypatch.setattr(
        published,
        "counted_segments",
        lambda names: segments.counted_segments([n for n in names if "fence" not in n]),
    )
    history = zombie(0)
    with pytest.raises(AssertionError):
        history.check()


def test_publishing_without_confirming_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was stopped while he published must not call it committed."""
    monkeypatch.setattr(SharedLease, "confirm", lambda _: None)
    with pytest.raises(AssertionError, match=r"\bagain by\b"):
        zombie(0).check()


def test_a_lease_without_its_turn_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that look at once and then take would not see each other."""
    monkeypatch.setattr(SharedBackend, "_exclusively", lambda self, who, act, undo=None: act())
    with pytest.raises((AssertionError, CheckpointError)):
        check_all(range(300))


def check_all(seeds: range) -> None:
    for seed in seeds:
        check_history(seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deaths", "stops", "errors"),
    [(0.01, 0, 0), (0, 0.01, 0), (0.005, 0.01, 0), (0.002, 0.03, 0), (0.004, 0.006, 8)],
)
def test_many_histories(deaths: float, stops: float, errors: float) -> None:
    for seed in range(10_000, 13_000):
        check_history(seed, deaths=deaths, stops=stops, errors=errors)
