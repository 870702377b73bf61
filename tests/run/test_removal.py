"""Output of sources that are gone is removed: killed at any moment, it is there whole or not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from snapshots import whole_files

from ray_resume import Checkpoint
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.checkpoint.local.lmdb_file import WriterFile
from ray_resume.core.digests import source_digest
from ray_resume.core.filenames import stem_of
from ray_resume.core.identity import HEADER_KEY, ids_of
from ray_resume.core.records import Record, State

pytestmark = pytest.mark.extended

RUN = "0123456789ab"
POINTS = ("store.making", "store.made", "cleanup.before", "cleanup.removing", "cleanup.removed")

# Nothing is to be read, so the driver removes by itself, without Ray.
REMOVE = """
import os, signal, sys
from pathlib import Path
from pyarrow.fs import LocalFileSystem
from ray_resume.checkpoint.local.backend import LocalBackend
from ray_resume.core.identity import ids_of
from ray_resume.core.planning import Listing, Policies
from ray_resume.core.sources import Source, SourceTable
from ray_resume.write.output import FolderOutput
from ray_resume.run.run import Run
from ray_resume.run.run_plan import RunPlan
from ray_resume.testing import kill_at
from ray_resume.write.folder import Folder

def remove(folder):
    out = str(folder / "out")
    sources = SourceTable.of([Source("b", "b")])
    output = FolderOutput(Folder(LocalFileSystem(), out, out), append=False)
    listing = Listing(sources, sources, ids_of("file"))
    policies = Policies(on_source_gone="remove")
    directory = LocalBackend(folder / "ckpt")
    plan = RunPlan(directory, listing, policies, output, table=None, signature="")
    return Run(plan).execute(lambda _: None, lease_wait_s=5)

for folder in map(Path, sys.argv[1:]):
    pid = os.fork()
    if pid == 0:
        with kill_at(folder.name):
            remove(folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, folder
"""


def prepare(folder: Path) -> None:
    """Three completed sources, ``a``, ``b`` and ``c``, with a file each."""
    directory, out = LocalBackend(folder / "ckpt"), folder / "out"
    out.mkdir(parents=True)
    prefix = f"{directory.ensure()}-{RUN}"
    directory.bind(str(out), RUN)
    records = []
    for number, name in enumerate("abc", 1):
        file = f"{stem_of(prefix, source_digest(name)[:8])}.parquet"
        (out / file).write_text(name)
        records.append(Record(name, State.COMPLETED, number, RUN, rows=1, parts=whole_files(file)))
    header = {"sources_total": 3, HEADER_KEY: ids_of("file")}
    writer = WriterFile.create(directory.path, RUN, header)
    writer.commit(records)
    writer.close()


def output(folder: Path) -> set[str]:
    return {Path(file).read_text() for file in Checkpoint(folder / "ckpt").files()}


@pytest.mark.long
def test_killed_anywhere_it_is_sound_and_the_next_run_ends_it(tmp_path: Path) -> None:
    folders = [tmp_path / point for point in POINTS]
    for folder in folders:
        prepare(folder)
    command = [sys.executable, "-c", REMOVE, *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for folder in folders:
        # All or nothing of it is committed, and what is listed is there.
        assert Checkpoint(folder / "ckpt").check(), folder
        assert output(folder) == ({"a", "b", "c"} if folder.name == POINTS[0] else {"b"})
    again = REMOVE.partition("for folder in")[0] + "for f in sys.argv[1:]:\n    remove(Path(f))\n"
    command = [sys.executable, "-c", again, *map(str, folders)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for folder in folders:
        assert output(folder) == {"b"}
        assert [path.read_text() for path in (folder / "out").iterdir()] == ["b"]
        report = Checkpoint(folder / "ckpt").check()
        assert (report.ok, report.notes) == (True, ()), report
