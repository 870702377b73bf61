"""Objects in storages of any make: how they are spelt, and what is tried again."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pyarrow.fs import LocalFileSystem

from ray_resume import Checkpoint, CheckpointError
from ray_resume.checkpoint.claims import Claim, Owner
from ray_resume.checkpoint.location import Location
from ray_resume.checkpoint.shared import objects
from ray_resume.checkpoint.shared.objects import StoredObjects
from ray_resume.files import whole_uri
from ray_resume.filesystems import open_uri

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:hush/hush@bucket/path",
        "s3://key:hush%hush@bucket/path",
        "s3://key:hush@bucket/a path",
        "s3://key:hush@buc ket/path",
        "S3://key:hush@bucket/path",
        "s3:/key:hush@bucket/a path",
        "foo://key:hush@host/path",
        "s3://key:hush@bucket/" + "long " * 200,
    ],
)
def test_no_message_tells_a_secret(uri: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be opened") as raised:
        Location(uri).open()
    assert "hush" not in "".join(traceback.format_exception(raised.value))
    assert "hush" not in repr(Checkpoint(uri))


def test_no_message_tells_a_signature() -> None:
    assert "hush" not in Checkpoint("abfs://c@account/x?se=1&sig=hush").path


def test_a_filesystem_of_fsspec_will_do(tmp_path: Path) -> None:
    place = Location(str(tmp_path / "ckpt"), filesystem=fsspec.filesystem("file"), lease_ttl_s=2)
    storage = place.open()
    storage.ensure()
    lease = storage.acquire(Owner.here("0" * 12), Claim(None), wait_s=0)
    lease.check()
    lease.end(wait_s=0)
    assert (tmp_path / "ckpt" / "checkpoint.json").exists()


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), 1e7, -1])
@pytest.mark.parametrize("option", ["lease_ttl_s", "publish_interval_s"])
def test_times_that_nobody_can_wait_for_are_refused(option: str, seconds: float) -> None:
    with pytest.raises(ValueError, match=option):
        Checkpoint("s3://bucket/path", **{option: seconds})  # type: ignore[arg-type]


def test_slashes_are_kept_and_added_where_one_is_missing() -> None:
    assert Checkpoint("hdfs:///data/x").path == whole_uri("hdfs:///data/x") == "hdfs:///data/x"
    assert Checkpoint(Path("s3://bucket/x")).path == "s3://bucket/x"


class Failing(LocalFileSystem):  # type: ignore[misc]
    """Fails for some times, as clients do that raise errors of their own."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.errors = list(errors)

    def open_input_stream(self, path: str, *_: Any, **__: Any) -> Any:
        if self.errors:
            raise self.errors.pop()
        return super().open_input_stream(path)


class ClientError(Exception):
    pass


@pytest.mark.parametrize("error", [ClientError("timeout"), OSError("no answer about runs/a403b")])
def test_what_may_pass_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(objects, "_RETRY_DELAYS_S", (0.0,))
    (tmp_path / "a").write_bytes(b"x")
    assert StoredObjects(Failing(error), str(tmp_path), "uri").get("a") == b"x"
    with pytest.raises(CheckpointError, match="uri fails: cannot read a"):
        StoredObjects(Failing(error, error), str(tmp_path), "uri").get("a")


def test_what_is_forbidden_is_not_tried_again(tmp_path: Path) -> None:
    failing = Failing(OSError("AWS Error UNKNOWN (HTTP status 403) during HeadObject"))
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="403"):
        StoredObjects(failing, str(tmp_path), "uri").get("a")


def test_no_directory_for_temporary_files_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Location(str(tmp_path / "ckpt"), shared=True).open()
    storage.ensure()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="Set TMPDIR"):
        storage.acquire(Owner.here("0" * 12), Claim(None), wait_s=0)


@pytest.mark.parametrize("what", ["checkpoint", "output folder"])
def test_a_place_that_cannot_be_opened_keeps_its_secrets(what: str) -> None:
    with pytest.raises(
        CheckpointError, match=rf"The {what} what://me@host/o .*pyarrow knows"
    ) as told:
        open_uri(what, "what://me:hidden@host/o", None)
    assert "hidden" not in f"{told.value}{told.value.__cause__}"
