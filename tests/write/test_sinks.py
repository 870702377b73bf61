"""Datasinks that publish, failures around that, and how datasinks are named.

Each sink of the documentation's table is in `test_writes_table`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import snapshot
from manifest_table import Table
from ray.data._internal.datasource.sql_datasink import SQLDatasink
from ray.data._internal.savemode import SaveMode

from ray_resume import (
    Checkpoint,
    NonResumableError,
    resumable,
    resumable_read,
    resumable_write,
)
from ray_resume.write.datasinks import title_of

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.mark.extended
@pytest.mark.parametrize(
    "fail",
    [
        "write",
        pytest.param("before", marks=pytest.mark.long),
        pytest.param("after", marks=pytest.mark.long),
    ],
)
def test_a_datasink_that_publishes_at_the_end(
    fail: str, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def job(fail: str) -> Any:
        ds = resumable_read(
            ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt", override_num_blocks=7
        )
        return resumable_write(ds, Table(tmp_path / "table", fail))

    table = Table(tmp_path / "table")
    if fail:
        with pytest.raises(Exception, match=r"bad row|catalog is down|answer got lost"):
            job(fail)
    done = Checkpoint(tmp_path / "ckpt").status().completed if fail else 0
    # Once, as plain Ray Data does it, and after what was complete was published.
    failures = tmp_path / "table" / "failures"
    assert failures.exists() == bool(fail)
    if fail:
        (failure,) = failures.read_text().splitlines()
        assert failure.endswith(f" {len(table.rows())}")
    summary = job("")
    assert (summary.sources_skipped, summary.sources_completed) == (done, 7 - done)
    once = list(range(600))
    if fail == "write":
        assert 0 < done < 7, "what was complete is published and committed"
    elif fail:
        assert done <= 1, "the empty source has nothing to publish"
        assert "has no place for a mark" in caplog.text
    if fail == "after":
        # Between publishing and committing: published twice, as the documentation says.
        assert table.rows() == sorted(2 * once)
    else:
        assert table.rows() == once
    assert job("").sources_skipped == 7


def test_what_makes_no_sink(source: Path, tmp_path: Path) -> None:
    ds = resumable_read(ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt")
    before = snapshot(tmp_path)
    # As the name and as the value of a mode.
    with pytest.raises(NonResumableError, match=SaveMode.ERROR.value):
        resumable_write(ds, Table(tmp_path / "table", mode=SaveMode.ERROR))
    with pytest.raises(TypeError, match="folders alone"):
        resumable_write(ds, Table(tmp_path / "table"), compression="zstd")
    with pytest.raises(NonResumableError, match="got no sink"):
        resumable_write(ds)
    assert snapshot(tmp_path) == before


def test_the_names_of_datasinks_tell_tables_apart_and_no_secrets(tmp_path: Path) -> None:
    from ray.data._internal.datasource.mongo_datasink import MongoDatasink

    insert = "insert\n into shop.rows(id) values (?)"
    assert title_of(SQLDatasink(insert, lambda: None)) == "datasink SQL shop.rows"
    assert title_of(SQLDatasink("call put(?)", lambda: None)) == "datasink SQL"
    mongo = object.__new__(MongoDatasink)
    mongo.uri, mongo.database, mongo.collection = "mongodb://me:secret@host", "shop", "rows"
    assert title_of(mongo) == "datasink Mongo shop.rows"
    assert title_of(Table(tmp_path)) == "datasink Table"
    delta_datasink = pytest.importorskip(
        "ray.data._internal.datasource.delta_datasink", reason="Ray 2.58"
    )
    DeltaDatasink = delta_datasink.DeltaDatasink  # noqa: N806
    delta = type("DeltaDatasink", (DeltaDatasink,), {})
    assert title_of(delta("/tables/rows/")) == "datasink Delta /tables/rows"
    assert title_of(DeltaDatasink("rows")) == f"datasink Delta {Path.cwd()}/rows"
    assert title_of(DeltaDatasink("s3://bucket/rows")) == "datasink Delta s3://bucket/rows"


@pytest.mark.extended
def test_a_table_is_published_while_the_pass_goes_on(source: Path, tmp_path: Path) -> None:
    """The last source waits until others are visible and committed, and then fails."""
    seen = tmp_path / "seen"

    @resumable
    def waiting(batch: Any) -> Any:
        deadline = time.monotonic() + 60
        while 599 in batch["id"] and not seen.exists():
            if (
                Checkpoint(tmp_path / "ckpt").status().completed
                and Table(tmp_path / "table").rows()
            ):
                seen.touch()
                raise RuntimeError("a bad row")
            assert time.monotonic() < deadline, "nothing was published"
            time.sleep(0.1)
        return batch

    def job() -> Any:
        ds = resumable_read(
            ray.data.read_parquet, str(source), checkpoint=tmp_path / "ckpt", override_num_blocks=7
        ).map_batches(waiting, batch_size=None)
        sink = Table(tmp_path / "table")
        return resumable_write(ds, sink, commit_interval_s=0.2, publish_interval_s=0.5)

    with pytest.raises(Exception, match="a bad row"):
        job()
    summary = job()
    assert summary.sources_skipped >= 1
    assert Table(tmp_path / "table").rows() == list(range(600))
