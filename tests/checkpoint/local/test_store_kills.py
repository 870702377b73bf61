"""A store whose writer is killed or forks: whole commits stay."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from children import run_python, start_python
from store_files import COMMIT_GROUPS, LmdbStore, records_in

from ray_resume.checkpoint.local.lmdb_file import read_writer, writer_files


def test_what_was_reported_survives_sigkill_and_groups_are_whole(tmp_path: Path) -> None:
    size, moments = 20, random.Random(1)
    for kill in range(8):
        run_id = f"run{kill}"
        child = start_python(COMMIT_GROUPS, tmp_path, run_id, size, "{run_id} {group} {k}")
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(moments.uniform(0, 0.15))
        child.kill()
        # Not communicate(), which passes over what readline() has read ahead.
        reported = 1 + child.stdout.read().count("\n")
        child.communicate()
        groups: dict[int, int] = {}
        for record in records_in(tmp_path / f"{run_id}.mdb").values():
            groups[record.sequence] = groups.get(record.sequence, 0) + 1
        assert set(groups.values()) == {size}
        # All that was reported is there, and at most the one group that was on its way.
        assert set(groups) in ({*range(1, reported + 1)}, {*range(1, reported + 2)})
    snapshot = LmdbStore(tmp_path).snapshot()
    assert len(snapshot) == sum(len(LmdbStore(tmp_path).read(f"run{k}")[1]) for k in range(8))


KILL_WHILE_CREATING = """
import itertools, os, random, signal, sys, time
from pathlib import Path
from ray_resume.checkpoint.local.lmdb_file import WriterFile, _lmdb

_lmdb()
moments = random.Random(2)
for kill in range(int(sys.argv[2])):
    pid = os.fork()
    if not pid:
        for i in itertools.count():
            WriterFile.create(Path(sys.argv[1]), f"{kill}-{i}", {"k": kill}).close()
    time.sleep(moments.uniform(0.001, 0.03))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""
FORKED = """
import ctypes, itertools, os, signal, sys, threading
from pathlib import Path
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.parts import FilePart
from ray_resume.core.records import Record, State

def done(number):
    parts = (FilePart("f" * 3000, 0, 1, 1),)
    return Record(f"s{number}", State.COMPLETED, number + 1, "run", parts=parts)

# A child forked by C would wait for ever if it handed Python's lock to a thread that it has not.
sys.setswitchinterval(60)
writer = WriterFile.create(Path(sys.argv[1]), "run", {})
numbers = itertools.count()
writer.commit([done(next(numbers))])
# Some are forked while a commit is under way.
stop = threading.Event()

def commit():
    while not stop.is_set():
        writer.commit([done(next(numbers)) for _ in range(50)])

thread = threading.Thread(target=commit)
thread.start()
children = []
for fork in [os.fork, ctypes.PyDLL(None).fork] * 4:
    child = fork()
    if child == 0:
        if len(children) >= 4:
            # As a child ends that runs to its end: whoever made it closes what is open.
            sys.exit() if fork is os.fork else ctypes.PyDLL(None).exit(0)
        while True:
            signal.pause()
    children.append(child)
for child in children[4:]:
    os.waitpid(child, 0)
stop.set()
thread.join()
# The map, of 16 MiB, grows under the children.
while (count := next(numbers)) < 8000:
    writer.commit([done(count), *(done(next(numbers)) for _ in range(200))])
print(count, *children[:4], flush=True)
sys.stdin.read()
"""


@pytest.mark.extended
@pytest.mark.long
def test_children_of_the_writers_process_do_its_file_no_harm(tmp_path: Path) -> None:
    """Children that live on, and children that end, forked by Python and by C."""
    writer = start_python(FORKED, tmp_path)
    assert writer.stdout is not None
    assert writer.stdin is not None
    count, *children = map(int, writer.stdout.readline().split())
    try:
        expected = {f"s{number}" for number in range(count)}
        path = tmp_path / "run.mdb"
        assert set(records_in(path, live=True)) == expected
        writer.kill()
        writer.wait()
        # The children are alive, and have the file mapped.
        assert set(records_in(path)) == expected
        assert set(records_in(path, live=True)) == expected
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        writer.kill()
        writer.wait()
        writer.stdin.close()
        writer.stdout.close()


def test_a_file_has_its_name_only_as_a_valid_store(tmp_path: Path) -> None:
    assert run_python(KILL_WHILE_CREATING, tmp_path, 60).returncode == 0
    files = writer_files(tmp_path)
    for run_id, path in files.items():
        header, log = read_writer(path, live=False)
        assert (header["run_id"], list(log)) == (run_id, [])
    # Else no kill came in time to prove anything.
    assert files
    assert any(name.startswith(".") for name in os.listdir(tmp_path))
