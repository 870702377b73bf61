"""One file in many sources, killed at random moments again and again."""

from __future__ import annotations

import gzip
import io
import json
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.parquet as pq
import pytest
from job import WITHOUT_TOKENS, kill_with_descendants
from places import SCRIPTS

from ray_resume import Checkpoint
from ray_resume.testing import check_exactly_once

ROWS, KILLS = 3000, 10
# A kill comes some time after so many rows, at most, have been through the UDF: whatever the speed
# of the machine, each job has begun its work and has not ended it.
MOST_ROWS, MOST_S = 300, 0.5


def parquet(path: Path) -> None:
    pq.write_table(pa.table({"id": range(ROWS)}), path, row_group_size=37)


def lines(path: Path) -> None:
    path.write_text("".join(f"{number}\n" for number in range(ROWS)))


def json_lines(path: Path) -> None:
    path.write_text("".join(json.dumps({"id": number}) + "\n" for number in range(ROWS)))


def csv(path: Path) -> None:
    path.write_text("id\n" + "".join(f"{number}\n" for number in range(ROWS)))


def compressed_lines(path: Path) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"id": number}) + "\n" for number in range(ROWS))


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(ROWS):
            data = json.dumps({"id": number}).encode()
            member = tarfile.TarInfo(f"{number:06}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def avro(path: Path) -> None:
    fastavro = pytest.importorskip("fastavro")
    schema = {"type": "record", "name": "Row", "fields": [{"name": "id", "type": "long"}]}
    with path.open("wb") as file:
        fastavro.writer(file, schema, [{"id": number} for number in range(ROWS)])


# How a file is read, cut, and written, and how its name ends.
FILES: list[tuple[str, str, Callable[[Path], None], str]] = [
    ("read_parquet", "row_group", parquet, "parquet"),
    ("read_json", "split", json_lines, "json"),
    ("read_text", "split", lines, "txt"),
    ("read_csv", "split", csv, "csv"),
    ("read_parquet", "rows", parquet, "parquet"),
    ("read_json", "rows", compressed_lines, "json.gz"),
    ("read_webdataset", "rows", tar, "tar"),
    ("read_avro", "rows", avro, "avro"),
    ("read_csv", "rows", csv, "csv"),
    ("read_text", "rows", lines, "txt"),
    ("read_json", "auto", json_lines, "json"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reader", "granularity", "write", "ending"), FILES, ids=[" ".join(f[:2]) for f in FILES]
)
def test_one_file_killed_ten_times_ends_with_each_row_once(
    reader: str,
    granularity: str,
    write: Callable[[Path], None],
    ending: str,
    another_cluster: str,
    tmp_path: Path,
) -> None:
    path, worked = tmp_path / f"one.{ending}", tmp_path / "worked"
    write(path)
    worked.touch()
    command: list[Any] = [sys.executable, SCRIPTS / "one_file_driver.py", reader, granularity]
    command += [path, tmp_path / "ckpt", tmp_path / "out", worked, another_cluster]
    moments = random.Random(f"{reader} {granularity}")
    done = []
    for _ in range(KILLS):
        job = subprocess.Popen(command, env=WITHOUT_TOKENS)
        wait_for_rows(job, worked, worked.stat().st_size + moments.randint(1, MOST_ROWS))
        time.sleep(moments.uniform(0, MOST_S))
        assert job.poll() is None
        kill_with_descendants(job.pid)
        done.append(Checkpoint(tmp_path / "ckpt").status().completed)
    subprocess.run(command, check=True, timeout=300, env=WITHOUT_TOKENS)
    print("KILLS", reader, granularity, "completed sources at each:", done)
    outcomes = [run.outcome for run in Checkpoint(tmp_path / "ckpt").runs()]
    assert outcomes.count("killed") == KILLS, outcomes
    assert done == sorted(done)
    assert done[0] < done[-1] < Checkpoint(tmp_path / "ckpt").status().completed
    column = "text" if reader == "read_text" else "id"
    files = Checkpoint(tmp_path / "ckpt").files()
    found = pds.dataset(files).to_table([column])[column].to_pylist()
    assert sorted(map(int, found)) == list(range(ROWS))
    check_exactly_once(tmp_path / "ckpt", [{column: value} for value in found])
    # Nearly all that was done before a kill was done once.
    assert ROWS <= worked.stat().st_size < 2 * ROWS


def wait_for_rows(job: subprocess.Popen[bytes], worked: Path, rows: int) -> None:
    """Wait until so many rows have been through the UDF."""
    deadline = time.monotonic() + 300
    while worked.stat().st_size < rows:
        assert job.poll() is None, "the job has ended"
        assert time.monotonic() < deadline, "the job does not work"
        time.sleep(0.01)
