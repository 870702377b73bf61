"""Which process this is, in words that another process can check, and whether it is dead.

A number of a process means something only in its own PID namespace, and until the host boots
again. So an identity holds all three. A process is dead if this host's kernel says so. In every
other case, such as another container's process, nothing is known, and it may be alive.
"""

from __future__ import annotations

import os
import select
from pathlib import Path

__all__ = ["is_dead", "this_process"]

UNKNOWN = "?"
"""The identity of a process whose host or PID namespace has no name."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")


def this_process() -> str:
    """Return the identity of this process: boot, PID namespace and process id."""
    where = _here()
    return UNKNOWN if where is None else f"{where} {os.getpid()}"


def is_dead(process: str) -> bool:
    """Report whether the process with this identity is dead for certain.

    Another process may have got the number since. Then this returns False until that one is dead,
    too: start times would tell the two apart, but they differ by the observer's time namespace.
    """
    where, _, number = process.rpartition(" ")
    if where != _here() or not number.isascii() or not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False  # It exists, as another user's process.
    return _has_exited(int(number))


def _here() -> str | None:
    try:
        return f"{_BOOT_ID.read_text().strip()} {os.readlink(_PID_NAMESPACE)}"
    except OSError:
        return None


def _has_exited(pid: int) -> bool:
    """Report whether all threads of a process have ended, and only its parent has yet to ask."""
    # Kernels before 5.3 lack it, and so do builds of Python for those.
    if not hasattr(os, "pidfd_open"):
        return False
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        exits = select.poll()
        exits.register(descriptor, select.POLLIN)
        return bool(exits.poll(0))
    finally:
        os.close(descriptor)
