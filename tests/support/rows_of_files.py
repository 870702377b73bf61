"""The rows in files of any output format, each as a text, without a reader of Ray Data's."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from ray_resume import Checkpoint

__all__ = ["live_rows", "rows_in"]


def rows_in(path: Path) -> list[str]:
    """Return the rows of one file in their order."""
    if path.suffix == ".parquet":
        return [repr(row) for row in pq.read_table(path).to_pylist()]
    if path.suffix == ".npy":
        return [repr(row.tolist()) for row in np.load(path)]
    if path.suffix == ".png":
        return [repr(np.asarray(Image.open(path)).tolist())]
    if path.suffix == ".tar":
        return _samples(path)
    assert path.suffix == ".tfrecords", path
    return list(_records(path.read_bytes()))


def live_rows(checkpoint: Path) -> Counter[str]:
    """Return the rows of all live parts."""
    files: dict[str, list[str]] = {}
    found: Counter[str] = Counter()
    for part in Checkpoint(checkpoint).parts():
        if part.file not in files:
            files[part.file] = rows_in(Path(part.file))
        rows = files[part.file][part.first_row : part.first_row + part.rows]
        assert len(rows) == part.rows, part
        found.update(rows)
    return found


def _samples(path: Path) -> list[str]:
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for entry in tar:
            file = tar.extractfile(entry)
            assert file is not None
            key, _, column = entry.name.partition(".")
            assert column not in samples.setdefault(key, {}), f"{path} has {entry.name} twice"
            samples[key][column] = file.read()
    return [repr((key, sorted(members.items()))) for key, members in samples.items()]


def _records(content: bytes) -> Iterator[str]:
    while content:
        length = int.from_bytes(content[:8], "little")
        yield repr(content[12 : 12 + length])
        assert len(content) >= 16 + length
        content = content[16 + length :]
