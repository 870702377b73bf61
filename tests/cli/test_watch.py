"""`ray-resume status --watch`: until the last live run ends, or Ctrl-C."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
from command import DEADLINE_S, Terminal, run, start

from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.local.lease import Lease

pytestmark = pytest.mark.long


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
