"""Actor pools on clusters of several sizes, and stages with a custom resource, beside plain."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
from conftest import write_source

DRIVER = Path(__file__).parent.parent / "drivers" / "pool_driver.py"
NAMES = ("pool", "two_pools", "resource")
TIMEOUT_S = 600


def rows_in(folder: Path) -> list[tuple[Any, ...]]:
    table = ds.dataset(folder, format="parquet").to_table()
    return sorted(
        zip(*(table[name].to_pylist() for name in sorted(table.column_names)), strict=True)
    )


@pytest.mark.extended
@pytest.mark.long
@pytest.mark.parametrize("cpus", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_pools_write_the_same_rows_as_plain_ray_data(tmp_path: Path, cpus: int) -> None:
    """Other tests have four CPUs. If the driver hangs, what it has printed tells where."""
    write_source(tmp_path / "in", files=9, rows=20)
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(tmp_path), str(cpus)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Ray writes warnings there, too.
    assert f"ours {NAMES[-1]}" in done.stdout.splitlines(), done.stdout
    for name in NAMES:
        rows = rows_in(tmp_path / f"ours-{name}")
        assert rows == rows_in(tmp_path / f"plain-{name}"), name
        assert len(rows) >= 90, name
