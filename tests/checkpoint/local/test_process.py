"""Which processes are known to be dead: real ones, in every state that one can be in."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_resume.checkpoint.local import process as process_module
from ray_resume.checkpoint.local.process import is_dead, this_process

# It needs none of the libraries whose oldest versions are tested.
pytestmark = pytest.mark.long


def identity_of(pid: int) -> str:
    return this_process().rpartition(" ")[0] + f" {pid}"


def test_a_process_is_dead_from_its_end_on_whether_its_parent_asks_or_not() -> None:
    child = subprocess.Popen(["sleep", "60"])
    assert not is_dead(identity_of(child.pid))
    child.send_signal(signal.SIGSTOP)
    assert not is_dead(identity_of(child.pid))
    child.kill()
    deadline = time.monotonic() + 20
    while not is_dead(identity_of(child.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, 0)  # It is a zombie.
    child.wait()
    assert is_dead(identity_of(child.pid))


def test_a_process_lives_as_long_as_any_of_its_threads() -> None:
    """Its first thread may end before the others, and looks like a zombie then."""
    code = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=[60]).start()\n"
        "print(flush=True)\n"
        "ctypes.PyDLL(None).pthread_exit(None)\n"
    )
    child = subprocess.Popen(["python3", "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(0.2)
    assert not is_dead(identity_of(child.pid))
    child.kill()
    child.wait()
    child.stdout.close()


def test_this_process_and_others_of_this_host_are_alive() -> None:
    assert not is_dead(this_process())
    assert not is_dead(identity_of(1))
    release = threading.Event()
    thread = threading.Thread(target=release.wait)
    thread.start()
    # A number that a thread has got since may be anything.
    assert thread.native_id is not None
    assert not is_dead(identity_of(thread.native_id))
    release.set()
    thread.join()


@given(st.text(max_size=60))
def test_nothing_is_known_of_a_process_that_another_host_or_container_names(text: str) -> None:
    here = this_process()
    assert not is_dead(text)
    assert not is_dead(f"{text} 999999999")
    if not (text.isascii() and text.isdecimal()):
        assert not is_dead(f"{here.rpartition(' ')[0]} {text}")
    assert not is_dead(f"{text}{here}") or not text


def test_nothing_is_known_where_the_kernel_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    dead = identity_of(child.pid)
    assert is_dead(dead)

    def refuse(*_: object) -> None:
        raise PermissionError

    with monkeypatch.context() as patched:
        patched.setattr(os, "kill", refuse)
        assert not is_dead(dead)
    with monkeypatch.context() as patched:
        patched.setattr(process_module, "_PID_NAMESPACE", Path("/nowhere"))
        assert this_process() == "?"
        assert not is_dead(dead)
        assert not is_dead("None 1")
