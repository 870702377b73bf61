"""The checkpoint of the pipeline before, made by another version: refused by name, untouched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import snapshot
from raw_store import put
from snapshots import whole_files

from ray_resume.checkpoint.location import Location
from ray_resume.checkpoint.shared import segments
from ray_resume.checkpoint.upstream import Upstream
from ray_resume.core.records import Record, State, encode
from ray_resume.errors import CheckpointError

RUN = "0" * 12
THIS_SEGMENT = segments._FORMAT_VERSION


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


def make_records_of(path: Path, kind: str, version: int) -> None:
    """Change the version in the file of the run's records, as another ray_resume writes it."""
    if kind == "local":
        put(path / f"{RUN}.mdb", b"header", json.dumps({"format": version}).encode())
        return
    (segment,) = (path / "runs" / RUN).iterdir()
    body = segment.read_bytes()[: -segments._CHECKSUM_BYTES]
    this, other = (f'"segment_format": {one}'.encode() for one in (THIS_SEGMENT, version))
    assert body.count(this) == 1
    # The version has one digit in both, so no length in the file changes.
    body = body.replace(this, other)
    segment.write_bytes(body + segments._checksum(body))


@pytest.mark.parametrize("kind", ["local", "shared"])
@pytest.mark.parametrize(
    ("version", "way_out"),
    [(2, r"before the first release made it[:.] [Gg]o on with that version"), (9, r"[Uu]pgrade")],
)
def test_an_upstream_of_another_version_is_refused(
    tmp_path: Path, kind: str, version: int, way_out: str
) -> None:
    path = tmp_path / "ckpt"
    upstream = made(path, kind)
    assert len(upstream.sources()) == 1
    identity = path / "checkpoint.json"
    original = identity.read_text()
    identity.write_text(json.dumps({**json.loads(original), "format": version}))
    before = snapshot(path)
    for ask in (Upstream(Location(str(path))).sources, Upstream(Location(str(path))).folder):
        with pytest.raises(CheckpointError, match=rf"{path} has format {version}.*{way_out}"):
            ask()
    assert snapshot(path) == before
    identity.write_text(original)

    make_records_of(path, kind, version)
    before = snapshot(path)
    with pytest.raises(CheckpointError, match=rf"{path}/.*{RUN}.* {version}.*{way_out}"):
        Upstream(Location(str(path), shared=kind == "shared")).sources()
    assert snapshot(path) == before
