"""How users call the public names. The type checker reads this; nobody runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.data import Dataset

from ray_resume import (
    Checkpoint,
    CheckpointStatus,
    RunSummary,
    SourceRecord,
    resumable,
    resumable_read,
    resumable_write,
)


@resumable
def bare(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


@resumable(one_to_one=True)
def with_options(batch: dict[str, Any], *, factor: int = 1) -> dict[str, Any]:
    return batch


@resumable(origin="position")
def generator(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield batch


@resumable(by="path", on_error="dead_letter", version="v2")
def by_path(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


@resumable
class Model:
    def __init__(self, path: str) -> None:
        self.path = path

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield batch


def decorated_names_keep_their_types() -> None:
    result: dict[str, Any] = with_options({}, factor=2)
    model: Model = Model("weights")
    path: str = model.path
    print(result, path, bare({}), list(generator({})), by_path({}))


def reads_and_writes(checkpoint: Checkpoint, folder: Path) -> RunSummary:
    ds: Dataset = resumable_read(ray.data.read_parquet, "in", checkpoint=checkpoint, columns=["a"])
    ds = resumable_read(ray.data.read_csv, checkpoint, checkpoint="second", on_source_gone="keep")
    ds = resumable_read(lambda key: {"a": [key]}, keys=[1, 2], checkpoint="ckpt")
    resumable_write(ds)
    return resumable_write(ds, folder, format="json", append=True, partition_cols=["a"])


def places(folder: Path) -> list[Checkpoint]:
    bucket = Checkpoint("s3://bucket/ckpt", publish_interval_s=10, lease_ttl_s=60.0)
    return [bucket, Checkpoint(folder, shared=True), Checkpoint(bucket)]


def looks(checkpoint: Checkpoint) -> int:
    status: CheckpointStatus = checkpoint.status()
    records: list[SourceRecord] = list(checkpoint.sources(state="failed"))
    files: list[str] = checkpoint.files()
    return status.completed + len(records) + len(files) + checkpoint.reset(version="1")
