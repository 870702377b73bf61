"""Rows for formats of which a file cannot hold any rows, and what is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import ray

from ray_resume import Checkpoint, resumable

__all__ = ["DIVIDED", "checked_files", "values"]


@resumable
def by_id(batch: Any) -> Any:
    return {"id": batch["id"], "text": np.array([str(i).encode() for i in batch["id"]])}


@resumable
def encoded(batch: Any) -> Any:
    ids = batch["id"]
    return {
        "__key__": np.array([f"{i:06d}" for i in ids]),
        "cls": ids,
        "npy": np.stack([np.full((2, 3), i) for i in ids]),
    }


@resumable
def drawn(batch: Any) -> Any:
    images = [np.full((2, 3), i % 256, np.uint8) for i in batch["id"]]
    return {"id": batch["id"], "x": np.stack(images)}


# A UDF that makes the rows, and options.
DIVIDED: dict[str, tuple[Any, dict[str, Any]]] = {
    "webdataset": (encoded, {}),
    "numpy": (encoded, {"column": "npy"}),
    "tfrecords": (by_id, {}),
    "images": (drawn, {"column": "x"}),
}


def values(folder: Path, name: str) -> list[Any]:
    """Return what Ray Data reads from a folder, sorted."""
    found = getattr(ray.data, f"read_{name}")(str(folder)).take_all()
    for row in found:
        row.pop("__url__", None)
    return sorted(
        [{key: np.asarray(value).tolist() for key, value in row.items()} for row in found], key=str
    )


def checked_files(folder: Path) -> list[Path]:
    """Return the files of the output, all of them clean and listed."""
    checkpoint = Checkpoint(folder / "ckpt")
    report = checkpoint.check()
    assert report.ok, report
    files = [path for path in (folder / "out").rglob("*") if path.is_file()]
    assert set(checkpoint.files()) == {str(path) for path in files}
    return files
