"""How the command starts: fast, with few modules loaded."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from children import run_python
from command import run_alone

import ray_resume

pytestmark = pytest.mark.long


def test_the_console_script_is_declared() -> None:
    text = (Path(ray_resume.__file__).parents[1] / "pyproject.toml").read_text()
    assert '[project.scripts]\nray-resume = "ray_resume.cli:main"\n' in text


LOADED = """
import sys
from ray_resume.cli import main

try:
    code = main(sys.argv[1:])
except SystemExit as over:
    code = over.code
heavy = ("ray", "pyarrow", "pandas", "lmdb")
print(code, [name for name in heavy if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments", [["status"], ["status", "--json"], ["sources"], ["runs"], ["files"], ["check"]]
)
def test_nothing_heavy_is_loaded_but_what_records_are_in(path: Path, arguments: list[str]) -> None:
    name, *options = arguments
    result = run_python(LOADED, name, path, *options, check=True)
    assert result.stderr == "0 ['pyarrow']\n"


def test_parts_of_files_load_nothing_else(shared: Path) -> None:
    result = run_python(LOADED, "status", shared, check=True)
    assert result.stderr == "0 ['pyarrow']\n"


def test_changing_something_loads_no_ray(path: Path) -> None:
    for arguments in (["reset", str(path), "--source", "a"], ["compact", str(path)]):
        result = run_python(LOADED, *arguments, check=True)
        assert result.stderr == "0 ['pyarrow', 'lmdb']\n"


def test_it_starts_in_well_under_a_second(path: Path) -> None:
    def cpu_s() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    took = []
    for _ in range(2):
        started = cpu_s()
        assert run_alone("status", path).returncode == 0
        took.append(cpu_s() - started)
    assert min(took) < 1.0


def test_the_package_is_as_it_was_with_names_loaded_late() -> None:
    script = (
        "import pickle, sys\n"
        "from ray_resume import *\n"
        "import ray_resume\n"
        "assert set(dir(ray_resume)) >= set(ray_resume.__all__)\n"
        "error = pickle.loads(pickle.dumps(ray_resume.CheckpointError('x')))\n"
        "assert type(error) is CheckpointError and resumable is ray_resume.resumable\n"
        "record = SourceRecord('a', 'failed', 0, (), None, 1, 'r', None)\n"
        "assert pickle.loads(pickle.dumps(record)) == record\n"
        "assert hasattr(ray_resume, 'nonsense') is False\n"
    )
    run_python(script, check=True)
