"""A driver that writes into a real table of Lance, Iceberg or Delta, and is killed on the way.

    python table_driver.py KIND SOURCE CHECKPOINT TABLE ADDRESS MOMENT [SHARD]

``MOMENT`` says when it kills itself with SIGKILL: while ``writing``, ``before`` publishing,
``between`` publishing and committing, or ``after`` the commit; ``later`` is between these two in
its second publication; ``never`` lets it end. The last two publish as soon as they can.
``SHARD`` is 0 or 1, of two.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
from ray.data.datasource import Datasink

KINDS = {
    "lance": "lance",
    "lance_ray": "lance_ray",
    "iceberg": "pyiceberg",
    "upsert": "pyiceberg",
    "delta": "deltalake",
}
"""What is written to, and the module that it needs. Delta needs Ray 2.58 too."""


def skip_if_not_installed(kind: str) -> None:
    import pytest

    pytest.importorskip(KINDS[kind])
    if kind == "delta":
        pytest.importorskip("ray.data._internal.datasource.delta_datasink", reason="Ray 2.58")


SCHEMA = pa.schema([("id", pa.int64()), ("name", pa.string()), ("weight", pa.float64())])


def datasink(kind: str, folder: Path) -> Datasink[Any]:
    """Make the datasink for the table in ``folder``, which is created if it is missing."""
    from ray.data._internal.datasource.iceberg_datasink import IcebergDatasink
    from ray.data._internal.savemode import SaveMode

    table = str(folder / "table")
    if kind == "delta":
        from ray.data._internal.datasource.delta_datasink import DeltaDatasink

        return DeltaDatasink(table)
    if kind in ("lance", "lance_ray"):
        if not os.path.exists(table):
            import lance

            lance.write_dataset(SCHEMA.empty_table(), table, schema=SCHEMA)
        if kind == "lance_ray":
            from lance_ray.datasink import LanceDatasink as OfLanceRay

            return OfLanceRay(table, mode="append")
        from ray.data._internal.datasource.lance_datasink import LanceDatasink

        return LanceDatasink(table, mode=SaveMode.APPEND)
    rows = catalog(folder).create_table_if_not_exists("shop.rows", schema=SCHEMA)
    if rows.current_snapshot() is None:
        # Ray cannot upsert into a table that was never written to.
        rows.append(SCHEMA.empty_table())
    properties = {"type": "sql", **properties_of(folder)}
    if kind == "iceberg":
        return IcebergDatasink("shop.rows", properties)
    return IcebergDatasink(
        "shop.rows", properties, mode=SaveMode.UPSERT, upsert_kwargs={"join_cols": ["id"]}
    )


def properties_of(folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    return {"uri": f"sqlite:///{folder}/catalog.db", "warehouse": f"file://{folder}/warehouse"}


def catalog(folder: Path) -> Any:
    from pyiceberg.catalog.sql import SqlCatalog

    sql = SqlCatalog("default", **properties_of(folder))
    sql.create_namespace_if_not_exists("shop")
    return sql


def ids_in_table(kind: str, folder: Path) -> list[int]:
    """Read the table with its own library; return the ids in it, sorted."""
    table = str(folder / "table")
    if kind in ("lance", "lance_ray"):
        import lance

        rows = lance.dataset(table).to_table()
    elif kind == "delta":
        from deltalake import DeltaTable

        if not DeltaTable.is_deltatable(table):
            return []
        rows = DeltaTable(table).to_pyarrow_table()
    else:
        rows = catalog(folder).load_table("shop.rows").scan().to_arrow()
    assert set(rows.schema.names) == set(SCHEMA.names)
    return sorted(rows["id"].to_pylist())


def killing(inner: Datasink[Any], moment: str, folder: Path) -> Datasink[Any]:
    """Make ``inner`` kill this process at ``moment``."""
    driver = os.getpid()
    kind: Any = type(inner)
    publications: list[int] = []

    class Killing(kind):  # type: ignore[misc]
        def write(self, blocks: Any, ctx: Any) -> Any:
            result = super().write(blocks, ctx)
            if moment == "writing":
                os.kill(driver, signal.SIGKILL)
            return result

        def on_write_complete(self, write_result: Any) -> None:
            if moment == "before":
                kill_myself()
            super().on_write_complete(write_result)
            for signs in folder.glob(f"signs-{driver}"):
                (signs / "published").touch()
            publications.append(1)
            is_second = len(publications) == 2
            if moment == "between" or (moment == "later" and is_second):
                kill_myself()

    # By its class's name a checkpoint knows it again.
    Killing.__name__ = kind.__name__
    inner.__class__ = Killing
    return inner


def waiting(folder: Path) -> Callable[[Any], Any]:
    """Make a UDF whose later calls wait a while for the rows of the first to be published.

    A task hands on what a call returned when the next one has returned.
    """

    def wait(batch: Any) -> Any:
        deadline = time.monotonic() + 4
        while (folder / "called").exists() and not (folder / "published").exists():
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        (folder / "called").touch()
        return batch

    return wait


def kill_myself() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody survives SIGKILL")


def main() -> None:
    import logging

    import ray

    from ray_resume import Checkpoint, CheckpointError, resumable, resumable_read, resumable_write

    kind, source, checkpoint, folder, address, moment, *shard = sys.argv[1:]

    def kill_after_the_commit() -> None:
        while True:
            try:
                status = Checkpoint(checkpoint).status()
                if status.total == status.completed > 0:
                    kill_myself()
            except CheckpointError:
                pass
            time.sleep(0.002)

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    often = moment in ("later", "never")
    ds = resumable_read(
        ray.data.read_parquet,
        source,
        checkpoint=checkpoint,
        override_num_blocks=7 if often else 2,
        shard=(int(shard[0]), 2) if shard else None,
    )
    options: Any = {}
    if often:
        signs = Path(folder, f"signs-{os.getpid()}")
        signs.mkdir(parents=True)
        udf = resumable(waiting(signs))
        ds = ds.map_batches(udf, batch_size=None, concurrency=1)
        options = {"commit_interval_s": 0.1, "publish_interval_s": 0.2}
    sink = killing(datasink(kind, Path(folder)), moment, Path(folder))
    if moment == "after":
        threading.Thread(target=kill_after_the_commit, daemon=True).start()
    print(resumable_write(ds, sink, **options), flush=True)
    if moment == "after":
        time.sleep(60)


if __name__ == "__main__":
    main()
