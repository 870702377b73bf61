"""The driver of `driver.py`, which also forks a child while it holds the lease.

    python forking_driver.py SOURCE CHECKPOINT OUT [ADDRESS]

The child's process id is in the file ``child`` beside the checkpoint. It outlives the driver.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

import driver

CHILD_FILE = "child"


def sleep() -> None:
    # The test that started the driver reads its output to the end.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    time.sleep(600)


def fork_when_leased(checkpoint: Path) -> None:
    while not list(checkpoint.glob("*.mdb")):
        time.sleep(0.01)
    child = multiprocessing.get_context("fork").Process(target=sleep)
    child.start()
    written = checkpoint.parent / f"{CHILD_FILE}.new"
    written.write_text(str(child.pid))
    written.rename(checkpoint.parent / CHILD_FILE)


if __name__ == "__main__":
    checkpoint = Path(sys.argv[2])
    threading.Thread(target=fork_when_leased, args=(checkpoint,), daemon=True).start()
    driver.main()
