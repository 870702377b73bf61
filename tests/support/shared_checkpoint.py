"""A shared checkpoint: runs that commit, here and elsewhere, and a storage that gives no answer."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar, cast

import pytest

from ray_resume import Checkpoint, CheckpointError
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.location import Location
from ray_resume.checkpoint.shared.backend import SharedBackend
from ray_resume.core.digests import source_digest
from ray_resume.core.records import Record, State

# Longer than any machine stalls, so that no live process is declared dead.
TTL_S = 60.0
# For the tests that wait until it has passed. If the machine stalled meanwhile, they wait longer.
SHORT_TTLS_S = (3.0, 15.0)
OTHER_HOST = (
    "from ray_resume.checkpoint.shared import scratch\nscratch.boot_id = lambda: 'another host'\n"
)


def opened(place: Location) -> SharedBackend:
    storage = place.open()
    assert isinstance(storage, SharedBackend)
    storage.ensure()
    return storage


def claim(*source_ids: str) -> Claim:
    return Claim(frozenset(map(source_digest, source_ids)))


def run(number: int) -> str:
    return f"{number:012x}"


def objects_of(storage: SharedBackend) -> Any:
    return storage._objects


def commit(storage: SharedBackend, number: int, *source_ids: str, sequence: int = 0) -> None:
    """Be a run that completes sources, and ends."""
    lease = storage.acquire(Owner.here(run(number)), claim(*source_ids), wait_s=0)
    ledger, writer = storage.bind_ledger(run(number), lease).open({"sources_total": 7})
    writer.commit(records(number, *source_ids, sequence=sequence))
    writer.close()
    ledger.release()
    lease.end(wait_s=5)


def records(number: int, *source_ids: str, sequence: int = 0) -> list[Record]:
    return [
        Record(source_id, State.COMPLETED, sequence + i, run(number), rows=1)
        for i, source_id in enumerate(source_ids, 1)
    ]


def completed(storage: SharedBackend, own: int = 0xFFF) -> set[str]:
    return {record.source_id for record in storage.committed_by_dead_runs(run(own)).snapshot}


Test = TypeVar("Test", bound=Callable[..., None])


def with_short_ttls(test: Test) -> Test:
    """Run a test with a short TTL, and with a longer one if the machine stalled and it failed.

    A process that got no processor for so long is rightly declared dead.
    """

    @functools.wraps(test)
    def run(place: Location, **given: Any) -> None:
        for ttl_s in SHORT_TTLS_S:
            path = place.path.replace("/ckpt", f"/ckpt-{ttl_s}")
            short = replace(place, path=path, lease_ttl_s=ttl_s)
            with stalls() as longest_s:
                try:
                    test(place=short, **given)
                    return
                except (AssertionError, CheckpointError, pytest.fail.Exception):
                    if ttl_s == SHORT_TTLS_S[-1] or max(longest_s) < ttl_s / 10:
                        raise

    return cast(Test, run)


@contextlib.contextmanager
def stalls() -> Iterator[list[float]]:
    """Measure how long a thread got no processor."""
    longest_s, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            before = time.monotonic()
            time.sleep(0.02)
            longest_s.append(time.monotonic() - before)

    threading.Thread(target=watch, daemon=True).start()
    yield longest_s
    over.set()


def script(place: Location, body: str, *, other_host: bool) -> list[str]:
    """Make a program with a storage ``storage`` at ``place``; another host's, if that is wanted."""
    return [
        sys.executable,
        "-c",
        f"import sys, os, signal, time\n"
        f"from ray_resume.checkpoint.location import Location\n"
        f"from ray_resume.checkpoint.claims import Claim, Owner\n"
        f"{OTHER_HOST if other_host else ''}"
        f"shared, ttl_s = {place.shared}, {place.lease_ttl_s}\n"
        f"storage = Location(sys.argv[1], shared=shared, lease_ttl_s=ttl_s).open()\n"
        f"{body}",
        place.path,
    ]


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def place_of(place: Location) -> Checkpoint:
    return Checkpoint(place.path, shared=place.shared, lease_ttl_s=place.lease_ttl_s)


class Unanswered:
    """A storage that gives no answer when something of this name is put; that lands later."""

    def __init__(self, objects: Any, name: str) -> None:
        self._objects = objects
        self._name = name
        self.under_way: list[tuple[str, bytes]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def put(self, name: str, data: bytes) -> None:
        if name.endswith(self._name):
            self.under_way.append((name, data))
            raise CheckpointError(f"cannot write {name}")
        self._objects.put(name, data)

    replace = put

    def land(self) -> None:
        for name, data in self.under_way:
            self._objects.replace(name, data)
