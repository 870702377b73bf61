"""The checkpoint of the pipeline before, made by another version: refused by name, untouched."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
from conftest import snapshot
from snapshots import whole_files

from ray_resume.checkpoint.location import Location
from ray_resume.checkpoint.upstream import Upstream
from ray_resume.core.records import Record, State, encode
from ray_resume.errors import CheckpointError

RUN = "0" * 12
VERSIONS = {
    "local": "ray_resume.checkpoint.local.lmdb_file.FORMAT_VERSION",
    "shared": "ray_resume.checkpoint.shared.segments._FORMAT_VERSION",
}


def made(path: Path, kind: str) -> Upstream:
    """Make a checkpoint with one completed source."""
    location = Location(str(path), shared=kind == "shared")
    storage = location.open()
    storage.ensure()
    storage.bind(str(path.parent / "out"), RUN)
    parts = whole_files("0.parquet", rows=5)
    record = Record("/in/0", State.COMPLETED, 1, RUN, rows=5, parts=parts)
    storage.write_whole(RUN, {}, encode([record]))
    return Upstream(location)


@pytest.mark.parametrize("kind", VERSIONS)
@pytest.mark.parametrize(
    ("version", "way_out"),
    [(2, r"before the first release made it[:.] [Gg]o on with that version"), (99, r"[Uu]pgrade")],
)
def test_an_upstream_of_another_version_is_refused(
    tmp_path: Path, kind: str, version: int, way_out: str
) -> None:
    path = tmp_path / "ckpt"
    assert made(path, kind).sources().part_lists is not None
    assert len(made(path, kind).sources()) == 1
    identity = path / "checkpoint.json"
    original = identity.read_text()
    identity.write_text(json.dumps({**json.loads(original), "format": version}))
    before = snapshot(path)
    for ask in (Upstream(Location(str(path))).sources, Upstream(Location(str(path))).folder):
        with pytest.raises(CheckpointError, match=rf"{path} has format {version}.*{way_out}"):
            ask()
    assert snapshot(path) == before
    identity.write_text(original)

    other = tmp_path / "other"
    with mock.patch(VERSIONS[kind], version):
        try:
            upstream = made(other, kind)
        except CheckpointError:
            # It is read back.
            upstream = Upstream(Location(str(other), shared=kind == "shared"))
    before = snapshot(other)
    with pytest.raises(CheckpointError, match=rf"{other}/.*{RUN}.* {version}.*{way_out}"):
        upstream.sources()
    assert snapshot(other) == before
