"""The versions that the package says it works with, and what it relies on in each Ray of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from children import run_python
from conftest import write_source
from packaging.requirements import Requirement
from packaging.version import Version
from places import ROOT
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasink, Datasource, ReadTask

from ray_resume import resumable, resumable_read, resumable_write
from ray_resume.raydata.internals import TESTED_RAY


def declared() -> list[Requirement]:
    """Return the package's own dependencies."""
    # Python 3.10 has no parser of TOML.
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return [Requirement(spelt) for spelt in re.findall(r'"(.+)"', found[1])]


def bounds(requirement: Requirement) -> dict[str, Version]:
    return {part.operator: Version(part.version) for part in requirement.specifier}


def test_the_oldest_that_is_declared_is_the_oldest_that_is_tested() -> None:
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    tested = {pin.name: bounds(pin)["=="] for pin in pins}
    assert {each.name: bounds(each)[">="] for each in declared()} == tested


def test_the_range_of_ray_is_told_the_same_everywhere() -> None:
    (ray_,) = (each for each in declared() if each.name == "ray")
    first, beyond = (Version(".".join(map(str, version))) for version in TESTED_RAY)
    assert bounds(ray_) == {">=": first, "<": beyond}
    told = f"Ray {first.major}.{first.minor} to {beyond.major}.{beyond.minor - 1}"
    for document in ("README.md", "CONTRIBUTING.md"):
        assert told in (ROOT / document).read_text()


def test_ci_tests_with_the_oldest_as_documented() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.search(r"<!-- run: oldest -->\n```bash\n(.*?)```", text, re.DOTALL)
    assert found is not None
    assert "-c .ci/oldest.txt" in found[1]
    assert "run_documented CONTRIBUTING.md oldest" in (ROOT / ".ci" / "run").read_text()


def test_a_ray_that_is_not_known_is_refused_at_import() -> None:
    (major, first), (beyond_major, beyond) = TESTED_RAY
    unknown = (
        f"{major}.{first - 1}.1",
        f"{beyond_major}.{beyond}.0",
        f"{beyond_major + 1}.0.0.dev0",
    )
    script = (
        "import ray.data\n"
        "from ray.data._internal.logical import operators\n"
        "from ray.data._internal.datasource.parquet_datasource import _ParquetFragment\n"
        "def attempt():\n"
        "    try:\n"
        "        from ray_resume import resumable_read\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
        "version = ray.__version__\n"
        f"for ray.__version__ in {unknown}: attempt()\n"
        "ray.__version__ = version\n"
        "moved = operators.StreamingRepartition\n"
        "del operators.StreamingRepartition; attempt()\n"
        "operators.StreamingRepartition = moved\n"
        "moved = _ParquetFragment.__init__\n"
        "_ParquetFragment.__init__ = lambda self: None; attempt()\n"
        "_ParquetFragment.__init__ = moved\n"
        "from ray_resume import resumable_read\n"
    )
    result = run_python(script, check=True)
    reasons = [
        *(f"{re.escape(version)}: it was never tested" for version in unknown),
        r".*: cannot import name 'StreamingRepartition'",
        r".*: _ParquetFragment has no _fragment",
    ]
    for line, reason in zip(result.stdout.splitlines(), reasons, strict=True):
        assert re.match(f"ray_resume does not know the insides of Ray {reason}", line)
        assert f"pip install 'ray[data]>={major}.{first},<{beyond_major}.{beyond}'" in line


# The facts: a Ray that breaks one of them needs another design, or is refused.


class Counting(Datasource):
    """Its rows name the call of ``get_read_tasks`` that they come from."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[bool] = []

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        call = len(self.calls)
        self.calls.append(data_context is not None)
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(lambda: [pa.table({"call": [call]})], unknown) for _ in range(3)]


@pytest.mark.usefixtures("cluster")
def test_of_each_execution_one_call_has_the_context_and_its_read_tasks_run(tmp_path: Path) -> None:
    datasource = Counting()
    ds = ray.data.read_datasource(datasource, override_num_blocks=3)
    mapped = ds.map_batches(lambda batch: batch)
    known = 0
    for number, execution in enumerate((ds, mapped, mapped)):
        folder = tmp_path / str(number)
        execution.write_parquet(str(folder))
        calls = [call for call, has_context in enumerate(datasource.calls) if has_context]
        assert len(calls) == known + 1
        ran = [i for path in folder.iterdir() for i in pq.read_table(path)["call"].to_pylist()]
        assert ran == 3 * [calls[-1]]
        known = len(calls)


def task_id() -> str:
    return str(ray.get_runtime_context().get_task_id())


class TaskLog(Datasink[None]):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, blocks: Any, ctx: Any) -> None:
        for block in blocks:
            for row in block.to_pylist():
                (self.folder / f"{row['read']} {row['stage']} {task_id()}").touch()


@pytest.mark.usefixtures("cluster")
def test_read_stage_and_write_still_run_in_one_task(tmp_path: Path) -> None:
    write_source(tmp_path / "in", files=4, rows=10)
    (tmp_path / "log").mkdir()

    @resumable
    def note(table: pa.Table) -> pa.Table:
        tasks = pa.array([task_id()] * table.num_rows)
        return table.append_column("stage", tasks)

    def load(key: int) -> pa.Table:
        return pa.table({"key": [key], "read": [task_id()]})

    ds = resumable_read(load, keys=[1, 2, 3, 4], checkpoint=tmp_path / "ckpt")
    ds = ds.map_batches(note, batch_format="pyarrow", batch_size=None)
    assert resumable_write(ds, TaskLog(tmp_path / "log")).sources_completed == 4
    seen = [path.name.split() for path in (tmp_path / "log").iterdir()]
    assert len(seen) == 4
    assert all(len(set(tasks)) == 1 for tasks in seen)
