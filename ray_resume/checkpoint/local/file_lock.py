"""An flock that belongs to one process.

The kernel gives an flock to an open file, and a forked child shares the open files of its parent:
it would keep the lock after the parent was killed, and could drop it while the parent is alive.
So a child that Python forks closes its parent's lock files at once. A parent unlocks before it
closes, which also takes the lock from children that C code forked. No lock file outlives an exec.

Children that C code forked still hold the lock of a parent that was killed; see `lease`.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

__all__ = ["FileLock"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.05


class FileLock:
    """A file that this process has open to lock it.

    Raises:
        OSError: on construction, if the file cannot be opened.
    """

    def __init__(self, path: Path, flags: int) -> None:
        self._descriptor: int | None = os.open(path, flags | os.O_CLOEXEC, 0o644)
        _open.add(self)

    @property
    def is_open(self) -> bool:
        """Whether this process has not closed the file. In a forked child it is closed."""
        return self._descriptor is not None

    def fileno(self) -> int:
        """Return the file's descriptor."""
        if self._descriptor is None:
            raise ValueError("the lock file is closed")
        return self._descriptor

    def lock(self, *, shared: bool = False, wait_s: float = 0.0) -> bool:
        """Lock the file, in place of the lock that it has here; report whether that succeeded.

        A lock that this process had before is lost if it did not.
        """
        operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        deadline, pause_s = time.monotonic() + wait_s, _FIRST_PAUSE_S
        while True:
            try:
                fcntl.flock(self.fileno(), operation | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
            # flock itself waits without limit, and only a signal could end that.
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def close(self) -> None:
        """Unlock and close the file. Closed already, it stays as it is."""
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        _open.discard(self)
        if descriptor is not None:
            os.close(descriptor)


_open: set[FileLock] = set()


def _close_in_child() -> None:
    """Close a child's share of the lock files without unlocking them for the parent."""
    for lock in list(_open):
        lock._close()


os.register_at_fork(after_in_child=_close_in_child)
