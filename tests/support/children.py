"""Python code in processes of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator

DEADLINE_S = 20.0


def run_python(code: str, *args: object, check: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=check)


def start_python(code: str, *args: object, close_fds: bool = True) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        close_fds=close_fds,
    )


@contextlib.contextmanager
def process(code: str, *args: object, close_fds: bool = True) -> Iterator[subprocess.Popen[str]]:
    """A process that has run ``code`` up to its first line of output, and is killed at the end."""
    child = start_python(code, *args, close_fds=close_fds)
    assert child.stdout is not None
    assert child.stdin is not None
    watchdog = threading.Timer(DEADLINE_S, child.kill)
    watchdog.start()
    try:
        assert child.stdout.readline(), "it did not get there"
        yield child
    finally:
        watchdog.cancel()
        child.kill()
        child.wait()
        child.stdin.close()  # Ends its children too.
        child.stdout.close()
